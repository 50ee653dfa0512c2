# ruff: noqa: N802 - the methods are named as in the service definitions
"""A stand-in for Modal on loopback, for the real client: a Sandbox is a folder, an exec in it a real local process, and a
deployed web function a real local process behind what stands in front of it on Modal.

Runs in an environment that has `modal`, on the service definitions of its own wheel:

    python modal_server.py PORT_FILE LOG_FILE [--lose N] [--secret NAME]… [--programs FOLDER] [--cut S] [--drop N] [--expire N]

It writes its port to PORT_FILE, and one JSON line per event to LOG_FILE. With `--lose N` the first N execs find that
their Sandbox has gone. The account has the secrets `--secret`; a container of a web function has the programs in
`--programs`; a request is cut after `--cut` seconds, the first `--drop` reloads of a completion's result lose their connection and
the first `--expire` results of completions are gone when they are fetched.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import signal
import time
from pathlib import Path

import grpclib.server
from grpclib import GRPCError, Status
from modal_apps import Apps, Shelf
from modal_proto import api_grpc, task_command_router_grpc
from modal_proto import api_pb2 as api
from modal_proto import task_command_router_pb2 as router
from modal_rpc import rpc

CONTAINER = {"PATH": "/usr/bin:/bin", "MODAL_SECRET_OF_THE_CONTAINER": "s3cret"}
"""The variables of an exec: the system's Python, and one that no sample may see. `--packages` puts another one first, whose
packages stand for those of an image that was built with some."""


class Sandbox:
    def __init__(self, number):
        self.id, self.task_id = f"sb-{number:022d}V", f"ta-{number:022d}V"
        self.alive = True
        self.execs = {}


class World:
    """What the two services share."""

    def __init__(self, log, given):
        self.log, self.lose, self.cut, self.programs = log, given.lose, given.cut, given.programs
        self.folder, self.mark = given.log_file.parent, os.environ.get("MODAL_EVAL_TEST_MARK", "")
        self.left = {"drop": given.drop, "expire": given.expire}
        self.shelf = Shelf(given.secret)
        self.container = CONTAINER
        if given.packages:
            self.container = {**CONTAINER, "PATH": f"{given.packages}:{CONTAINER['PATH']}"}
        self.numbers = itertools.count(1)
        self.sandboxes = {}
        self.url = ""

    def note(self, event, **facts):
        self.log.write(json.dumps({"event": event, **facts}) + "\n")
        self.log.flush()

    def take(self, fault):
        """Whether this time `fault` happens."""
        self.left[fault] -= 1
        return self.left[fault] >= 0

    def by_task(self, task_id):
        sandbox = next((one for one in self.sandboxes.values() if one.task_id == task_id), None)
        if sandbox is None or not sandbox.alive:
            raise GRPCError(Status.NOT_FOUND, f"task {task_id} has ended")
        return sandbox

    def end(self, sandbox):
        sandbox.alive = False
        for process in sandbox.execs.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def unimplemented(name):
    async def method(self, stream):
        request = await stream.recv_message()
        self.world.note("unimplemented", name=name, request=str(request)[:300])
        raise GRPCError(Status.UNIMPLEMENTED, f"{name} is not in this stand-in")

    return method


def service(base):
    """`base` with every method that nobody wrote answering UNIMPLEMENTED."""

    def fill(cls):
        for name in base.__abstractmethods__:
            if getattr(cls, name) is getattr(base, name):
                setattr(cls, name, unimplemented(name))
        cls.__abstractmethods__ = frozenset()
        return cls

    return fill


def token():
    def part(data):
        return base64.urlsafe_b64encode(json.dumps(data).encode()).rstrip(b"=").decode()

    return f"{part({'alg': 'none'})}.{part({'exp': time.time() + 3600})}.x"


SUCCESS = api.GenericResult(status=api.GenericResult.GENERIC_STATUS_SUCCESS)


@service(api_grpc.ModalClientBase)
class ControlPlane(Apps, api_grpc.ModalClientBase):
    def __init__(self, world):
        self.world = world

    @rpc
    def ClientHello(self, request):
        return api.ClientHelloResponse()

    @rpc
    def AuthTokenGet(self, request):
        return api.AuthTokenGetResponse(token=token())

    @rpc
    def EnvironmentGetOrCreate(self, request):
        settings = api.EnvironmentSettings(image_builder_version="2025.06", webhook_suffix="")
        metadata = api.EnvironmentMetadata(name=request.deployment_name or "main", settings=settings)
        return api.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    @rpc
    def ImageGetOrCreate(self, request):
        files = [hashlib.sha256(file.data).hexdigest() for file in request.image.context_files]
        self.world.note("image", commands=list(request.image.dockerfile_commands), files=files)
        return api.ImageGetOrCreateResponse(image_id="im-1", result=SUCCESS)

    @rpc
    async def ImageJoinStreaming(self, request):
        yield api.ImageJoinStreamingResponse(result=SUCCESS, eof=True)

    @rpc
    def SandboxCreateV2(self, request):
        sandbox = Sandbox(next(self.world.numbers))
        self.world.sandboxes[sandbox.id] = sandbox
        asked = request.definition
        self.world.note(
            "create", id=sandbox.id, tags={tag.tag_name: tag.tag_value for tag in request.tags}, app=request.app_id,
            network=api.NetworkAccess.NetworkAccessType.Name(asked.network_access.network_access_type),
            timeout=asked.timeout_secs, idle=asked.idle_timeout_secs, milli_cpu=asked.resources.milli_cpu,
            memory_mb=asked.resources.memory_mb, memory_max_mb=asked.resources.memory_mb_max,
        )  # fmt: skip
        access = api.CommandRouterAccess(url=self.world.url, jwt=token())
        return api.SandboxCreateV2Response(sandbox_id=sandbox.id, task_id=sandbox.task_id, command_router_access=access)

    @rpc
    def SandboxGetCommandRouterAccess(self, request):
        return api.SandboxGetCommandRouterAccessResponse(url=self.world.url, jwt=token())

    @rpc
    def SandboxTerminateV2(self, request):
        self.world.end(self.world.sandboxes[request.sandbox_id])
        self.world.note("terminate", id=request.sandbox_id)
        return api.SandboxTerminateResponse()


@service(task_command_router_grpc.TaskCommandRouterBase)
class Worker(task_command_router_grpc.TaskCommandRouterBase):
    def __init__(self, world):
        self.world = world

    @rpc
    async def TaskExecStart(self, request):
        sandbox = self.world.by_task(request.task_id)
        self.world.note("exec", id=sandbox.id, timeout=request.timeout_secs)
        if self.world.lose > 0:
            self.world.lose -= 1
            self.world.end(sandbox)
            raise GRPCError(Status.NOT_FOUND, "the Sandbox has gone")
        sandbox.execs[request.exec_id] = await asyncio.create_subprocess_exec(
            *request.command_args, stdin=-1, stdout=-1, stderr=-1, start_new_session=True, env=self.world.container
        )
        return router.TaskExecStartResponse()

    @rpc
    async def TaskExecStdinWrite(self, request):
        stdin = self.world.by_task(request.task_id).execs[request.exec_id].stdin
        with contextlib.suppress(ConnectionError):
            stdin.write(request.data)
            await stdin.drain()
        if request.eof:
            stdin.close()
        return router.TaskExecStdinWriteResponse()

    @rpc
    async def TaskExecStdioRead(self, request):
        process = self.world.by_task(request.task_id).execs[request.exec_id]
        is_error = request.file_descriptor == router.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDERR
        while data := await (process.stderr if is_error else process.stdout).read(65_536):
            yield router.TaskExecStdioReadResponse(data=data)

    @rpc
    async def TaskExecWait(self, request):
        code = await self.world.by_task(request.task_id).execs[request.exec_id].wait()
        return router.TaskExecWaitResponse(code=code) if code >= 0 else router.TaskExecWaitResponse(signal=-code)


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port_file", type=Path)
    parser.add_argument("log_file", type=Path)
    parser.add_argument("--lose", type=int, default=0)
    parser.add_argument("--secret", action="append", default=[])
    parser.add_argument("--programs", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--cut", type=float, default=150.0)
    parser.add_argument("--drop", type=int, default=0)
    parser.add_argument("--expire", type=int, default=0)
    given = parser.parse_args()
    with given.log_file.open("a", encoding="utf-8") as log:
        world = World(log, given)
        server = grpclib.server.Server([ControlPlane(world), Worker(world)])
        await server.start("127.0.0.1", 0)
        port = server._server.sockets[0].getsockname()[1]
        world.url = f"http://127.0.0.1:{port}"
        partly = given.port_file.with_suffix(".new")
        partly.write_text(str(port))
        partly.replace(given.port_file)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()
        for sandbox in world.sandboxes.values():
            world.end(sandbox)
        for app in world.shelf.apps.values():
            if app.site:
                app.site.end_container()
        server.close()


asyncio.run(main())
