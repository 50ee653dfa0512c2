"""As much HTTP/1.1 as a misbehaving server needs: every byte is ours to send, hold back or cut."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit


class ClientGoneError(ConnectionError):
    """The client closed its side before the answer was sent."""


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: dict[str, str] = field(repr=False)
    """Names in lower case."""
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    def query(self, name: str) -> str | None:
        return parse_qs(urlsplit(self.target).query).get(name, [None])[0]

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One client's connection: requests come out, bytes go in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def requests(self) -> AsyncIterator[Request]:
        """The requests of this connection until the client closes it."""
        while head := await self._head():
            line, *fields = head
            method, target, _ = line.split(" ", 2)
            headers = {name.strip().lower(): value.strip() for name, _, value in (f.partition(":") for f in fields)}
            body = await self._body(headers)
            yield Request(method, target, headers, body)

    async def _head(self) -> list[str]:
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return []
        return head.decode("latin-1").rstrip("\r\n").split("\r\n")

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self.reader.readexactly(int(headers.get("content-length", 0)))
        parts = []
        while size := int((await self.reader.readuntil(b"\r\n")).split(b";")[0], 16):
            parts.append(await self.reader.readexactly(size))
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)
        return b"".join(parts)

    async def hold(self, seconds: float) -> None:
        """Wait; raise `ClientGoneError` as soon as the client has closed, so that its answer never counts as sent."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not self.reader.at_eof() and not self.writer.is_closing():
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.05))
        raise ClientGoneError

    async def write(self, data: bytes) -> None:
        if self.reader.at_eof() or self.writer.is_closing():
            raise ClientGoneError
        self.writer.write(data)
        await self.writer.drain()

    async def respond(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        await self.write(head(status, {"Content-Length": str(len(body)), **(headers or {})}) + body)

    async def respond_json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        await self.respond(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def abort(self) -> None:
        """Close at once, with nothing more said."""
        self.writer.transport.abort()


def head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"
