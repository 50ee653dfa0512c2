"""The way upstream: one pool of connections, whole replies, and every failure of the wire under one of our names."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from modal_eval.proxy.faults import Fault
from modal_eval.proxy.replies import Reply

MAX_BODY_BYTES = 64 * 2**20
"""Of a request or an answer. Token probabilities of a long answer take a few MB."""
KEEP_ALIVE_PROBES = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}
"""A host that vanished without a word is noticed after 90 s, although an answer may rightly take an hour."""


class Transport:
    """Sends requests. Raises `Fault` for everything that can happen on the way."""

    def __init__(self, *, connect_timeout_s: float, silence_timeout_s: float) -> None:
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_timeout_s, sock_read=silence_timeout_s)
        self._sessions = {direct: self._open(trust_env=not direct) for direct in (True, False)}

    def _open(self, *, trust_env: bool) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30, socket_factory=watched_socket),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=self._timeout,
            trust_env=trust_env,
        )

    async def send(
        self,
        method: str,
        url: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> Reply:
        """One request and its whole reply; redirects are the caller's business."""
        session = self._sessions[is_loopback(url)]
        began = time.monotonic()
        try:
            async with (
                asyncio.timeout(timeout_s),
                session.request(method, url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                content, first_data_s = await read_whole(response, began)
                return Reply(
                    response.status,
                    response.headers.get("content-type", "application/json"),
                    content,
                    response.headers.get("location", ""),
                    response.headers.get("retry-after"),
                    first_data_s,
                )
        except (aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
            raise of_wire(error) from error
        except ValueError as error:  # a request that cannot be made at all, whatever the server does
            raise Fault("request", f"the request cannot be sent: {error}", "final") from error

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()


async def read_whole(response: aiohttp.ClientResponse, began: float) -> tuple[bytes, float | None]:
    """The body, and for a stream when its first event came."""
    first_data_s = None
    parts, size = [], 0
    async for chunk in response.content.iter_any():
        if first_data_s is None and b"data:" in chunk:
            first_data_s = time.monotonic() - began
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise Fault("too_large", f"the answer has more than {MAX_BODY_BYTES // 2**20} MiB", "final")
    return b"".join(parts), first_data_s


def of_wire(error: Exception) -> Fault:
    """Name a failure of the connection. Order matters: aiohttp's classes inherit from each other."""
    said = str(error) or type(error).__name__
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.InvalidURL):
        return Fault("address", said, "final")
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Fault("connect", f"cannot connect: {said}", "away", dropped=True)
    if isinstance(error, TimeoutError):
        return Fault("silent", "the server was silent for too long", "failed")
    return Fault("dropped", f"the connection broke: {said}", "failed", dropped=True)


def is_loopback(url: str) -> bool:
    """Whether a request stays on this machine, where no HTTP proxy of the environment may get into its way."""
    return is_loopback_host(urlsplit(url).hostname or "")


@functools.lru_cache(maxsize=256)
def is_loopback_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def watched_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE_PROBES.items():
        made.setsockopt(socket.IPPROTO_TCP, option, value)
    return made
