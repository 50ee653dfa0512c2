"""A model server that only answers: as fast as Python can, after a latency of one's choice.

    python benchmarks/stub.py --latency 0.1        # prints {"port": N}, serves until stdin ends, then prints its counts

It speaks as much HTTP/1.1 as a keep-alive client needs, because a server with a framework would be what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time

import uvloop

TEXT = "Let me think. " * 40 + "\n#### 42"
HEALTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def answer(number: int) -> bytes:
    """About 1 KB, different for each call."""
    body = json.dumps(
        {
            "id": f"stub-{number}",
            "object": "chat.completion",
            "created": 0,
            "model": "stub",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"{number} {TEXT}"}}
            ],
            "usage": {"prompt_tokens": 400, "completion_tokens": 160, "total_tokens": 560},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


class Stub(asyncio.Protocol):
    calls = 0
    first = last = 0.0
    """When the first call arrived and the last answer left, on the clock that all processes of this machine share."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.data) < end + 4 + length:
                return
            self.data = self.data[end + 4 + length :]
            if not head.startswith(b"post"):
                self.transport.write(HEALTH)  # type: ignore[attr-defined]
                continue
            Stub.calls += 1
            Stub.first = Stub.first or time.monotonic()
            reply = answer(Stub.calls)
            if self.latency:
                asyncio.get_running_loop().call_later(self.latency, self.write, reply)
            else:
                self.write(reply)

    def write(self, reply: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(reply)  # type: ignore[attr-defined]
            Stub.last = time.monotonic()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    latency = parser.parse_args().latency
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Stub(latency), "127.0.0.1", 0, backlog=4096)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    with contextlib.suppress(BrokenPipeError):  # not everybody wants to know
        print(json.dumps({"calls": Stub.calls, "first": Stub.first, "last": Stub.last}), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
