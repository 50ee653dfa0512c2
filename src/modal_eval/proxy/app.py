"""The proxy's HTTP face: OpenAI's routes on loopback, and a few routes to steer it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from urllib.parse import unquote

import orjson
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from modal_eval.proxy.desk import Desk, Served
from modal_eval.proxy.faults import CallError, error_body
from modal_eval.proxy.journal import Journal
from modal_eval.proxy.keys import TAG, Request, understand
from modal_eval.proxy.settings import ProxySettings
from modal_eval.proxy.transport import MAX_BODY_BYTES

ROLLOUT_HEADER = b"x-modal-eval-rollout"
FAULT_HEADER = "X-Modal-Eval-Fault"
"""Says that an error is no answer of the model: the rollout is unscored, never wrong."""
SOURCE_HEADER = "X-Modal-Eval-Source"
"""`journal` or `upstream`."""
MS_HEADER = "X-Modal-Eval-Ms"
"""How long the call took without its wait for a place, in ms; of a replayed one, how long it took then."""

ROUTES = re.compile(r"(?:/rollout/(?P<tag>.+?))?(?P<path>/v1/[\w/.:-]+|/tokenize|/detokenize)")
PORT = re.compile(rb":\d+$")
LOOPBACK_NAMES = frozenset({b"127.0.0.1", b"localhost", b"[::1]"})
WAITING = b": waiting\n\n"


class Calls:
    """Everything that is posted but the control routes, as an ASGI application of its own."""

    def __init__(self, app: FastAPI, settings: ProxySettings) -> None:
        self._app = app
        self._keep_alive_s = settings.keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        desk: Desk = self._app.state.desk
        try:
            tag, path = address_of(scope)
            request = understood(path, await read_body(scope, receive))
            if request.stream:
                response = await self._stream(desk, request, tag, receive)
            else:
                response = reply(await desk.serve(request, tag, lambda: hang_up(receive)))
        except CallError as error:
            response = failure(error)
        if response is not None:
            await response(scope, receive, send)

    async def _stream(self, desk: Desk, request: Request, tag: str, receive: Receive) -> Response | None:
        """A stream is sent when it is whole and on disk; a harness that waits for long hears comments meanwhile."""
        serving = asyncio.ensure_future(desk.serve(request, tag, lambda: hang_up(receive)))
        done, _ = await asyncio.wait({serving}, timeout=self._keep_alive_s)
        if done:
            return reply(serving.result())

        async def parts() -> AsyncIterator[bytes]:
            try:
                while not (await asyncio.wait({serving}, timeout=self._keep_alive_s))[0]:
                    yield WAITING
                served = serving.result()
                yield served.answer.body if served else b""
            except CallError as error:
                yield b"data: " + error.body() + b"\n\n"
            finally:
                serving.cancel()  # the call itself goes on

        return StreamingResponse(parts(), media_type="text/event-stream")


def address_of(scope: Scope) -> tuple[str, str]:
    """The rollout that a request belongs to and the route that it asks for.

    A harness that cannot set a header says it in its base URL: `/rollout/17%2F3/v1`.
    """
    found = ROUTES.fullmatch(scope["path"])
    if found is None:
        raise CallError(404, "not_found", f"no route {scope['path']}: /v1/… and /tokenize are answered")
    tag = unquote(found["tag"] or "") or dict(scope["headers"]).get(ROLLOUT_HEADER, b"").decode("latin-1")
    if TAG.fullmatch(tag) is None:
        raise CallError(
            400, "bad_tag", f"rollout {tag[:140]!r} is not up to 128 ASCII characters without quote and backslash"
        )
    path = found["path"]
    if path in ("/v1/tokenize", "/v1/detokenize"):  # servers have these beside /v1, clients with one base URL do not
        path = path.removeprefix("/v1")
    query = scope["query_string"].decode("latin-1")
    return tag, f"{path}?{query}" if query else path


def understood(path: str, body: bytes) -> Request:
    try:
        return understand(path, body)
    except ValueError as error:
        raise CallError(400, "bad_request", f"the body of POST {path} is no JSON object: {error}") from None


async def read_body(scope: Scope, receive: Receive) -> bytes:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallError(499, "hung_up", "the request ended before its body")
        part = message.get("body", b"")
        parts.append(part)
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise CallError(413, "too_large", f"the request has more than {MAX_BODY_BYTES // 2**20} MiB")
        if not message.get("more_body", False):
            return b"".join(parts)


async def hang_up(receive: Receive) -> None:
    """Returns when the harness closes its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def reply(served: Served | None) -> Response | None:
    if served is None:
        return None
    answer = served.answer
    headers = {SOURCE_HEADER: served.source, MS_HEADER: str(answer.ms), "content-type": answer.content_type}
    return Response(answer.body, answer.status, headers)


def failure(error: CallError) -> Response:
    return Response(error.body(), error.status, {FAULT_HEADER: "upstream"}, media_type="application/json")


class Entrance:
    """Refuses requests meant for another name, and sends calls on their way before FastAPI looks at them.

    A web page whose name was turned to 127.0.0.1 may not steer a run. FastAPI's middleware, telemetry and router cost a
    fifth of a call's time, and a call needs nothing of them.
    """

    def __init__(self, app: FastAPI, calls: Calls) -> None:
        self._app = app
        self._calls = calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = next((value for name, value in scope["headers"] if name == b"host"), b"")
        if PORT.sub(b"", host) not in LOOPBACK_NAMES:
            body = error_body(f"this proxy answers to 127.0.0.1, not to {host.decode('latin-1')}", "forbidden", 403)
            await Response(body, 403, media_type="application/json")(scope, receive, send)
        elif scope["method"] == "POST" and not scope["path"].startswith("/control/"):
            await self._calls(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def make_app(
    settings: ProxySettings, journal: Journal, key: str | None, on_ready: Callable[[], None] = lambda: None
) -> ASGIApp:
    """The application; `on_ready` is called when it takes calls, and `journal` is closed when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        desk = app.state.desk = Desk(settings, journal, key)
        on_ready()
        try:
            yield
        finally:
            await desk.close()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    async def models(request: HttpRequest) -> Response:
        try:
            answer = await request.app.state.desk.models()
        except CallError as error:
            return failure(error)
        return Response(answer.body, answer.status, media_type=answer.content_type)

    async def stats(request: HttpRequest) -> Response:
        return Response(orjson.dumps(request.app.state.desk.stats()), media_type="application/json")

    async def begin_pass(request: HttpRequest) -> Response:
        request.app.state.desk.occurrences.begin_pass()
        return Response(status_code=204)

    async def health(request: HttpRequest) -> Response:
        return Response(status_code=200)

    app.router.routes += [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/rollout/{tag:path}/v1/models", models),
        Route("/control/stats", stats),
        Route("/control/begin-pass", begin_pass, methods=["POST"]),
    ]
    return Entrance(app, Calls(app, settings))
