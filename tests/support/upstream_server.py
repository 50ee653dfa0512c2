"""The scripted OpenAI-compatible server: what it hears it counts, what it says is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.support import answers
from tests.support.behaviours import Behaviour, Call, Script
from tests.support.http11 import ClientGoneError, Connection, Request, chunk, head

TAG_HEADER = "x-modal-eval-rollout"
RESULT_QUERY = "__modal_function_call_id"
COMPLETIONS = ("/v1/completions", "/v1/chat/completions")


@dataclass
class Job:
    """One accepted POST: what it will say, and how often its result was asked for."""

    entry: dict[str, Any]
    key: str
    body: answers.Body
    said: list[str]
    behaviour: Behaviour
    hops_left: int
    drops_left: int


class Ledger:
    """What the server saw; the base of every claim that nothing was paid twice."""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.posts: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.finished: Counter[str] = Counter()
        self.repeated: Counter[str] = Counter()
        self.healthy: Counter[str] = Counter()
        self.gets = 0
        self.in_flight = 0
        self.max_in_flight = 0

    def enter(self) -> None:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def post(self, request: Request, tag: str, digest: str) -> dict[str, Any]:
        key = f"{tag}:{digest}"
        self.posts[key] += 1
        self.tags[tag] += 1
        if self.finished[key]:
            self.repeated[key] += 1
        entry = {
            "number": len(self.log) + 1, "at": time.time(), "path": request.path, "tag": tag, "digest": digest,
            "authorized": "authorization" in request.headers, "finished": False,
        }  # fmt: skip
        self.log.append(entry)
        return entry

    def finish(self, job: Job) -> None:
        job.entry["finished"] = True
        self.finished[job.key] += 1

    def stats(self) -> dict[str, Any]:
        return {
            "posts": len(self.log),
            "gets": self.gets,
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "keys": dict(self.posts),
            "finished": dict(self.finished),
            "repeated_after_finish": {key: count for key, count in self.repeated.items() if count},
        }


class UpstreamServer:
    """Listens on two kernel-chosen ports: the API, and a control port that an outage of the API leaves alone."""

    def __init__(self, model: str = "stub", api_key: str | None = None, max_model_len: int = 32_768) -> None:
        self.script = Script()
        self.ledger = Ledger()
        self.model = model
        self.max_model_len = max_model_len
        self._api_key = api_key
        self._jobs: dict[str, Job] = {}
        self._connections: set[Connection] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._place = socket.socket()
        """Holds the port while nobody listens on it: a socket that is bound but does not listen refuses connections."""
        self._listener: asyncio.Server | None = None
        self._control: asyncio.Server | None = None
        self._reopening: asyncio.Task[None] | None = None

    async def start(self, port: int = 0) -> None:
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._place.bind(("127.0.0.1", port))
        await self._listen()
        self._control = await asyncio.start_server(self._serve_control, "127.0.0.1", 0)

    @property
    def port(self) -> int:
        return int(self._place.getsockname()[1])

    @property
    def control_port(self) -> int:
        assert self._control is not None
        return int(self._control.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._reopening:
            self._reopening.cancel()
        self._close()
        if self._control:
            self._control.close()
        for handler in self._handlers:
            handler.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        self._place.close()

    async def _listen(self) -> None:
        self._listener = await asyncio.start_server(
            self._serve_api, "127.0.0.1", self.port, reuse_port=True, backlog=4096, limit=1 << 20
        )

    def _close(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            connection.abort()

    def outage(self, seconds: float) -> None:
        """Refuse every connection and cut those that are open, then listen again on the same port."""
        self._close()

        async def reopen() -> None:
            await asyncio.sleep(seconds)
            await self._listen()

        if self._reopening:
            self._reopening.cancel()
        self._reopening = asyncio.get_running_loop().create_task(reopen())

    async def _serve_api(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        self._connections.add(connection)
        try:
            await self._serve(connection, api=True)
        finally:
            self._connections.discard(connection)

    async def _serve_control(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._serve(Connection(reader, writer), api=False)

    async def _serve(self, connection: Connection, *, api: bool) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        try:
            async for request in connection.requests():
                if request.path.startswith("/_"):
                    await self._administer(connection, request)
                elif api:
                    await self._answer(connection, request)
                else:
                    await connection.respond_json(404, {"error": "this is the control port"})
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, or a script cut it off: the ledger has what was finished
        finally:
            self._handlers.discard(handler)
            connection.writer.close()

    async def _administer(self, connection: Connection, request: Request) -> None:
        """`GET /_stats`, `GET /_log`, `POST /_script`."""
        if request.path == "/_stats":
            await connection.respond_json(200, self.ledger.stats())
        elif request.path == "/_log":
            await connection.respond_json(200, self.ledger.log)
        elif request.path == "/_script" and request.method == "POST":
            try:
                wanted = request.json()
                self.script.update(wanted)
            except (ValueError, TypeError) as error:
                await connection.respond_json(400, {"error": str(error)})
                return
            await connection.respond_json(200, {})
            if "outage" in wanted:
                self.outage(wanted["outage"])
        else:
            await connection.respond_json(404, {"error": f"no {request.path}"})

    async def _answer(self, connection: Connection, request: Request) -> None:
        if self._api_key and request.headers.get("authorization") != f"Bearer {self._api_key}":
            await _error(connection, 401, "the key is missing or wrong")
        elif request.path == "/health":
            await connection.respond(200, b"")
        elif request.path == "/version":
            await connection.respond_json(200, {"version": "0.0.0+stub"})
        elif request.path == "/v1/models":
            card = {"id": self.model, "object": "model", "created": 0, "owned_by": "stub", "root": self.model}
            await connection.respond_json(
                200, {"object": "list", "data": [{**card, "max_model_len": self.max_model_len}]}
            )
        elif request.path in ("/tokenize", "/v1/tokenize"):
            tokens = [answers.hashed(word) % 50_000 for word in answers.words(answers.prompts_of(request.json())[0])]
            await connection.respond_json(
                200, {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens}
            )
        elif call_id := request.query(RESULT_QUERY):
            await self._result(connection, request, call_id)
        elif request.path in COMPLETIONS and request.method == "POST":
            await self._complete(connection, request)
        else:
            await _error(connection, 404, f"no {request.method} {request.path}")

    async def _complete(self, connection: Connection, request: Request) -> None:
        body = request.json()
        tag, digest = request.headers.get(TAG_HEADER, ""), answers.canonical_digest(body)
        key = f"{tag}:{digest}"
        entry = self.ledger.post(request, tag, digest)
        behaviour = self.script.behaviour(
            Call(len(self.ledger.log), tag, self.ledger.tags[tag], self.ledger.posts[key], request.body.decode())
        )
        healthy = behaviour.status == 200 and not behaviour.fault
        self.ledger.healthy[key] += healthy
        variant = tag or str(self.ledger.healthy[key])
        said = answers.texts(body, behaviour.answer, variant, self.script.known)
        job = Job(entry, key, body, said, behaviour, behaviour.hops, behaviour.result_drops)
        self.ledger.enter()
        try:
            await connection.hold(behaviour.latency)
            if job.hops_left:
                call_id = uuid.uuid4().hex
                self._jobs[call_id] = job
                await self._redirect(connection, request, call_id, job)
            else:
                await self._say(connection, job)
        finally:
            self.ledger.in_flight -= 1

    async def _result(self, connection: Connection, request: Request, call_id: str) -> None:
        if request.method != "GET":
            await _error(connection, 400, "a result URL is read with GET")
            return
        self.ledger.gets += 1
        job = self._jobs.get(call_id)
        if job is None or job.behaviour.result_status != 200:
            await _error(connection, job.behaviour.result_status if job else 404, "the result has expired")
        elif job.drops_left:
            job.drops_left -= 1
            connection.abort()
        elif job.hops_left:
            await self._redirect(connection, request, call_id, job)
        else:
            await self._say(connection, job)

    async def _redirect(self, connection: Connection, request: Request, call_id: str, job: Job) -> None:
        await connection.hold(job.behaviour.cut)
        host = request.headers.get("host", f"127.0.0.1:{self.port}")
        await connection.respond(303, b"", {"Location": f"http://{host}{request.path}?{RESULT_QUERY}={call_id}"})
        job.hops_left -= 1

    async def _say(self, connection: Connection, job: Job) -> None:
        behaviour = job.behaviour
        response_id = f"stub-{job.entry['number']}"
        job.entry["answered"] = behaviour.fault or behaviour.status
        if behaviour.fault == "close":
            connection.abort()
        elif behaviour.fault == "silent":
            await connection.hold(float("inf"))
        elif behaviour.fault == "html":
            page = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
            await connection.respond(200, page, {"Content-Type": "text/html"})
        elif behaviour.status != 200:
            await _error(connection, behaviour.status, "scripted", behaviour.retry_headers(time.time()))
        elif job.body.get("stream"):
            events = answers.stream_events(job.body, job.said, behaviour.finish_reason, response_id)
            await self._stream(connection, job, events)
        else:
            whole = json.dumps(answers.response(job.body, job.said, behaviour.finish_reason, response_id)).encode()
            await self._send(connection, job, whole)

    async def _send(self, connection: Connection, job: Job, whole: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        if job.behaviour.fault == "broken_json":
            await connection.respond(200, whole[: len(whole) // 2], headers)
        elif job.behaviour.fault == "cut":
            await connection.write(head(200, {**headers, "Content-Length": str(len(whole))}) + whole[: len(whole) // 2])
            connection.writer.close()
        else:
            await connection.respond(200, whole, headers)
            self.ledger.finish(job)

    async def _stream(self, connection: Connection, job: Job, events: list[str]) -> None:
        fault = job.behaviour.fault
        await connection.write(head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}))
        for event in events[: len(events) // 2] if fault else events:
            await connection.hold(job.behaviour.word_latency)
            await connection.write(chunk(f"data: {event}\n\n".encode()))
        if fault == "broken_json":
            await connection.write(chunk(b'data: {"id": "stub", "choi\n\n') + chunk(b""))
        elif fault == "cut":
            connection.writer.close()
        else:
            await connection.write(chunk(b""))
            self.ledger.finish(job)


async def _error(connection: Connection, status: int, message: str, headers: dict[str, str] | None = None) -> None:
    error = {"message": message, "type": "server_error" if status >= 500 else "invalid_request_error", "code": status}
    with contextlib.suppress(ClientGoneError):
        await connection.respond_json(status, {"error": error}, headers)
