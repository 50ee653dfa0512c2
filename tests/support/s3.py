"""A real S3 server on loopback (SeaweedFS), with keys that it checks, and a relay in front that sees every request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from boto3 import client as boto3_client
from botocore.config import Config

from modal_eval.processes import OwnedProcess

BUCKET = "models"
KEYS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret-of-the-team"}
NO_RIGHTS = {"AWS_ACCESS_KEY_ID": "guest-key", "AWS_SECRET_ACCESS_KEY": "test-secret-of-a-guest"}
START_TIMEOUT_S = 60.0
INSIDE_A_BODY = 40_000
"""So many bytes of an answer are more than its headers."""
RANGED = re.compile(rb"GET (\S+) HTTP/1\.1\r\n(?:.*\r\n)*?Range: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)


def settings(url: str, keys: dict[str, str] = KEYS) -> dict[str, str]:
    """Environment of a process that shall find this server, and nothing else of the machine's AWS settings."""
    return {
        "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", **keys,
    }  # fmt: skip


@dataclass
class S3:
    url: str

    def client(self, **config: Any) -> Any:
        return boto3_client(
            "s3", endpoint_url=self.url, region_name="us-east-1", config=Config(**config),
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """The server with one bucket; its data stands in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = ["Admin", "Read", "Write", "List"]
    identities = [
        {"name": name, "credentials": [{"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}],
         "actions": actions}
        for name, keys, actions in (("team", KEYS, everything), ("guest", NO_RIGHTS, ["Read:other"]))
    ]  # fmt: skip
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    for _ in range(3):  # a port that was free may be somebody else's by the time weed asks for it
        master, volume, filer, s3, *more = _free_ports(8)
        grpc = [
            f"-{name}.port.grpc={port}" for name, port in zip(("master", "volume", "filer", "s3"), more, strict=True)
        ]
        command = [
            str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms",
            f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}",
            "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=512",
            "-volume.max=20", *grpc,
        ]  # fmt: skip
        with OwnedProcess.start(command, log_path=folder / "weed.log", grace_s=2) as process:
            server = S3(f"http://127.0.0.1:{s3}")
            if _ready(server, process):
                yield server
                return
    raise AssertionError(f"weed did not start in 3 tries:\n{(folder / 'weed.log').read_text()[-3000:]}")


def _ready(server: S3, process: OwnedProcess) -> bool:
    client = server.client(retries={"max_attempts": 1})
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
            return True
        time.sleep(0.1)
    return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Relay:
    """Passes bytes on between a client and the server. `url` stands in for the server."""

    target: str
    url: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    """Every range that was asked for: path, first byte, byte behind the last."""
    stop_after: int | None = None
    """Pass on so many bytes of answers, then none any more, until this is `None` again."""
    stopped: threading.Event = field(default_factory=threading.Event)
    corrupt: dict[tuple[str, int], int] = field(default_factory=dict)
    """How often the answer to (end of path, first byte) shall come with a wrong byte."""
    cut: dict[tuple[str, int], int] = field(default_factory=dict)
    """How often the connection shall break in the middle of that answer."""
    passed: int = 0

    def ranges(self, name: str) -> list[tuple[int, int]]:
        return sorted((start, end) for path, start, end in self.asked if path.endswith(name))

    def bytes_asked(self) -> int:
        return sum(end - start for _, start, end in self.asked)

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.removeprefix("http://").partition(":")
        there, back = await asyncio.open_connection(host, int(port))
        due: list[str] = []
        """What shall happen to the next answer of this connection: `corrupt` or `cut`."""
        ways = [
            asyncio.create_task(self._ask(reader, back, due)),
            asyncio.create_task(self._answer(there, writer, due)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            back.close()
            writer.close()

    async def _ask(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, due: list[str]) -> None:
        heard = b""
        while chunk := await reader.read(1 << 16):
            heard += chunk
            while b"\r\n\r\n" in heard:
                head, _, heard = heard.partition(b"\r\n\r\n")
                if found := RANGED.match(head + b"\r\n"):
                    path, start, end = found[1].decode(), int(found[2]), int(found[3]) + 1
                    self.asked.append((path, start, end))
                    due += [what for what in ("corrupt", "cut") if self._take(getattr(self, what), path, start)]
            back.write(chunk)
            await back.drain()

    def _take(self, planned: dict[tuple[str, int], int], path: str, start: int) -> bool:
        for name, first in planned:
            if path.endswith(name) and first == start and planned[name, first] > 0:
                planned[name, first] -= 1
                return True
        return False

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter, due: list[str]) -> None:
        head = b""
        while chunk := await there.read(1 << 16):
            if due:
                head += chunk
                if len(head) <= INSIDE_A_BODY:
                    continue
                chunk, head = head, b""
                if due.pop() == "cut":
                    writer.write(chunk)
                    return
                chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
            while self.stop_after is not None and self.passed >= self.stop_after:
                self.stopped.set()
                await asyncio.sleep(0.01)
            self.passed += len(chunk)
            writer.write(chunk)
            await writer.drain()


@contextlib.contextmanager
def relay(server: S3) -> Iterator[Relay]:
    """A relay in front of `server`, on a loop of its own."""
    made = Relay(server.url)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(_quietly(made), "127.0.0.1", 0))
    made.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(_end(listening), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _quietly(made: Relay) -> Any:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):  # a client that was killed
            await made.connect(reader, writer)

    return connect


async def _end(listening: asyncio.Server) -> None:
    listening.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
