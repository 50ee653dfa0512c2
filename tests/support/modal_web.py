"""What stands between a caller and a web function on Modal, and the container behind it.

As Modal documents it: a request that is not answered within 150 s (here `cut` seconds) gets a 303 to the same URL with
`?__modal_function_call_id=…`. A GET of that waits as long again, as often as it takes, without starting the work anew; a
POST of it is refused. A container starts with the first call that finds none.

The container is a real process that has what was uploaded and the secrets, and nothing else of ours. Its server says in
`place.json` where it listens: on this machine no two containers could have the port that each has on Modal.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

import aiohttp
from aiohttp import web

CALL = "__modal_function_call_id"
CONTAINER = """
import importlib, sys, threading
from modal._runtime import task_lifecycle_manager
task_lifecycle_manager._TaskLifecycleManager._singleton = object()  # what tells `modal.is_local()` where it is
getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()
threading.Event().wait()
"""
FORWARDED = ("authorization", "content-type", "x-modal-eval-rollout")


class Site:
    """One web function under a URL of its own."""

    def __init__(self, world, name, function, files, variables):
        self.world, self.name, self.function, self.files, self.variables = world, name, function, files, variables
        self.folder = Path(tempfile.mkdtemp(prefix="modal-container-", dir=world.folder))
        self.calls, self.container, self.starting = {}, None, asyncio.Lock()
        self.url = ""

    async def open(self):
        for name, content in self.files.items():
            path = self.folder / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self.answer)
        self.runner = web.AppRunner(app, access_log=None)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self.session = aiohttp.ClientSession()

    async def close(self):
        self.end_container()
        for call in self.calls.values():
            call.cancel()
        await self.session.close()
        await self.runner.cleanup()

    def end_container(self):
        if self.container and self.container.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.container.pid, signal.SIGKILL)

    def log(self):
        path = self.folder / "log"
        return path.read_text() if path.is_file() else ""

    async def answer(self, request):
        call_id = request.query.get(CALL)
        self.world.note("request", method=request.method, path=request.path, reload=bool(call_id))
        if call_id is None:
            call_id = f"fc-{uuid.uuid4().hex}"
            self.calls[call_id] = asyncio.ensure_future(self.work(request, await request.read()))
        elif request.method != "GET":
            return web.Response(status=400, text="modal-http: a result is fetched with GET")
        elif self.is_completion(request) and self.world.take("drop"):
            request.transport.abort()
            return web.Response()
        if (call := self.calls.get(call_id)) is None:
            return web.Response(status=404, text="modal-http: no such call")
        try:
            status, kind, content = await asyncio.wait_for(asyncio.shield(call), self.world.cut)
        except TimeoutError:
            location = f"{self.url}{request.path}?{CALL}={call_id}"
            return web.Response(status=303, headers={"Location": location})
        del self.calls[call_id]
        if request.query.get(CALL) and self.is_completion(request) and self.world.take("expire"):
            return web.Response(status=404, text="modal-http: the result has expired")
        return web.Response(status=status, body=content, headers={"Content-Type": kind})

    def is_completion(self, request):
        """Faults are for the calls that cost something."""
        return request.path.endswith("/completions")

    async def work(self, request, body):
        """Call the container, which is started when there is none."""
        async with self.starting:
            root = await self.started()
        if root is None:
            return 500, "text/plain", b"modal-http: internal error: the container failed to start"
        headers = {name: request.headers[name] for name in FORWARDED if name in request.headers}
        async with self.session.request(request.method, root + request.path, data=body or None, headers=headers) as got:
            return got.status, got.headers.get("Content-Type", "application/json"), await got.read()

    async def started(self):
        """Where the server in the container listens; `None` when the container ended before it did."""
        place = self.folder / "place.json"
        if self.container is None or self.container.returncode is not None:
            place.unlink(missing_ok=True)
            self.container = await self.start()
        while not place.is_file():
            if self.container.returncode is not None:
                self.world.note("container_failed", name=self.name, code=self.container.returncode)
                return None
            await asyncio.sleep(0.02)
        return json.loads(place.read_text())["url"]

    async def start(self):
        variables = {
            **self.variables, "PATH": f"{self.world.programs}:/usr/bin:/bin", "PYTHONPATH": str(self.folder / "root"),
            "STAND_IN_FOLDER": str(self.folder), "HOME": str(self.folder), "MODAL_EVAL_TEST_MARK": self.world.mark,
        }  # fmt: skip
        self.world.note("container", name=self.name)
        with (self.folder / "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, "-c", CONTAINER, self.function.module_name, self.function.implementation_name,
                env=variables, cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
