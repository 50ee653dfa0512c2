"""The HTTP endpoint of `modal-eval watch serve`: whoever has the token may say that a checkpoint is there."""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modal_eval.checkpoints.s3_objects import Address
from modal_eval.checkpoints.watching import Outcome, Watcher
from modal_eval.cli.output import talk
from modal_eval.errors import ConfigError, ModalEvalError

logger = logging.getLogger(__name__)

LARGEST_BODY = 16 * 1024
RETRY_AFTER_S = 30


class Told(BaseModel):
    """What a caller says: the event's own words. Run, step and stage are read from the prefix, whoever sends them."""

    model_config = ConfigDict(extra="ignore")

    bucket: Annotated[str, Field(min_length=1, max_length=255)]
    prefix: Annotated[str, Field(max_length=1024)]


class Guard:
    """Lets in who has the token, before anything of the request's body is read; and no body without end."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self._app(scope, receive, send)
            return
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
            answer = JSONResponse(
                {"error": "the bearer token is missing or wrong"}, 401, {"WWW-Authenticate": "Bearer"}
            )
            await answer(scope, receive, send)
            return
        body = await _body(receive)
        if body is None:
            await JSONResponse({"error": f"the body is longer than {LARGEST_BODY} bytes"}, 413)(scope, receive, send)
            return

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _body(receive: Receive) -> bytes | None:
    heard = b""
    while True:
        message: Message = await receive()
        heard += bytes(message.get("body", b""))
        if len(heard) > LARGEST_BODY:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return heard


def make_app(watcher: Watcher, token: str) -> ASGIApp:
    """`POST /checkpoints` and `GET /health`."""
    app = FastAPI(title="modal-eval watch", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/checkpoints")
    def checkpoint(told: Told) -> JSONResponse:
        address = Address(told.bucket, told.prefix.strip("/"))
        if not watcher.covers(address):
            return JSONResponse({"error": f"{address} is not below {watcher.where}, which is watched here"}, 422)
        try:
            watcher.memory.mark(address)
            outcome = watcher.look_at(address)
        except ModalEvalError as error:
            logger.warning("%s", error)
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        return JSONResponse(describe(outcome), 202 if outcome.kind in ("announced", "waiting") else 200)

    return Guard(app, token)


def describe(outcome: Outcome) -> dict[str, Any]:
    """What became of it, and the event where there is one."""
    told: dict[str, Any] = {"outcome": outcome.kind, "why": outcome.why}
    if outcome.announcement:
        told["event"] = {"id": outcome.announcement.id, **outcome.announcement.describe()}
    return told


def serve(watcher: Watcher, token: str, *, host: str, port: int, interval_s: float) -> None:
    """Serve until SIGINT or SIGTERM, and look every `interval_s` at what was not whole yet."""
    # Neither access log nor server header: a log line says nothing that ours do not, and could hold what a caller sent.
    config = uvicorn.Config(make_app(watcher, token), log_level="warning", access_log=False, server_header=False)
    with _listen(host, port) as listening, _second_looks(watcher, interval_s):
        talk.print(f"Listening on http://{host}:{listening.getsockname()[1]}/checkpoints", soft_wrap=True)
        uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except (OSError, OverflowError, UnicodeError) as error:  # taken or not ours; beyond 65535; no name of a host
        reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]  # the address is said once
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason}); give --port one that is free (0 finds one) and --host an IPv4 "
            "address of this machine"
        ) from error


@contextmanager
def _second_looks(watcher: Watcher, interval_s: float) -> Iterator[None]:
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(interval_s):
            try:
                watcher.look_at_open()
            except ModalEvalError as error:
                logger.warning("%s; trying again in %g s", error, interval_s)

    thread = threading.Thread(target=look, name="second-looks")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
