"""A pass-through in front of a real server that counts what it is asked for: the server's own view of who pays twice."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from urllib.parse import urlsplit

from tests.support.upstream_server import TAG_HEADER

TAG = re.compile(rb"^%s: *(\S+)\r\n" % TAG_HEADER.encode(), re.IGNORECASE | re.MULTILINE)
LONGEST_HEADER = 1024


class Relay:
    """Passes bytes on as they are, so a caller that goes away is gone for the server too; `url` stands in for it."""

    def __init__(self, target: str) -> None:
        self.url = ""
        self.shut = False
        """Whether the server is away: what is open is cut with its next byte, and nobody gets in."""
        self.refused = 0
        """How many tried meanwhile."""
        self._target = urlsplit(target)
        self._calls: Counter[str] = Counter()
        self._lock = threading.Lock()

    def calls(self) -> Counter[str]:
        """How often each rollout, `example/rollout`, was asked for."""
        with self._lock:
            return Counter(self._calls)

    def posts(self) -> int:
        return sum(self.calls().values())

    def _count(self, heard: bytes) -> bytes:
        """Count the calls that begin in `heard` and return what may be the start of another header."""
        end = 0
        for found in TAG.finditer(heard):
            end = found.end()
            with self._lock:
                self._calls[found.group(1).decode()] += 1
        return heard[end:][-LONGEST_HEADER:]

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.shut:
            self.refused += 1
            writer.close()
            return
        there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        ways = [
            asyncio.create_task(self._pass_on(reader, back, count=True)),
            asyncio.create_task(self._pass_on(there, writer, count=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # one side has gone: so goes the other
        finally:
            for way in ways:
                way.cancel()
            back.close()
            writer.close()

    async def _pass_on(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, count: bool) -> None:
        heard = b""
        with contextlib.suppress(OSError):
            while (piece := await source.read(65_536)) and not self.shut:
                if count:
                    heard = self._count(heard + piece)
                sink.write(piece)
                await sink.drain()

    async def serve(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        ended = asyncio.Event()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set_result((asyncio.get_running_loop(), ended))
        await ended.wait()
        server.close()


@contextlib.contextmanager
def relay(target: str) -> Iterator[Relay]:
    """Serve from a thread of this process; `target` is the server's root, without a path."""
    counted = Relay(target)
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(counted.serve(started)), name="relay")
    thread.start()
    loop, ended = started.result(30)
    try:
        yield counted
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        assert not thread.is_alive(), "the relay's thread did not end"
