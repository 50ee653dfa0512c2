"""A chat server for harnesses: says what a function of the test says, and remembers who asked what."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TAG = "X-Modal-Eval-Rollout"


@dataclass
class Reply:
    """One answer of the model, or an error of the server."""

    content: str | None = ""
    status: int = 200
    finish_reason: str = "stop"
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Call:
    tag: str
    body: dict[str, Any]

    @property
    def last(self) -> str:
        return str(self.body["messages"][-1].get("content") or "")


@dataclass
class ChatServer:
    url: str
    calls: list[Call]

    @property
    def tags(self) -> list[str]:
        return sorted(call.tag for call in self.calls)


@contextmanager
def chat_server(answer: Callable[[Call], Reply]) -> Iterator[ChatServer]:
    """A server on a port of the kernel's choice; `answer` is called once a request, from several threads."""
    calls: list[Call] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            call = Call(self.headers.get(TAG, ""), body)
            calls.append(call)
            reply = answer(call)
            kind, data = encode(body, reply)
            self.send_response(reply.status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1", calls)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def encode(body: dict[str, Any], reply: Reply) -> tuple[str, bytes]:
    if reply.status != 200:
        return "application/json", json.dumps({"error": {"message": reply.content, "type": "scripted"}}).encode()
    base = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    message: dict[str, Any] = {"role": "assistant", "content": reply.content}
    if reply.tool_calls:
        message["tool_calls"] = reply.tool_calls
    choice = {"index": 0, "finish_reason": reply.finish_reason}
    if not body.get("stream"):
        whole = {**base, "object": "chat.completion", "choices": [{**choice, "message": message}], "usage": usage}
        return "application/json", json.dumps(whole).encode()
    chunk = {**base, "object": "chat.completion.chunk"}
    deltas = [{"index": i, **tool_call} for i, tool_call in enumerate(reply.tool_calls)]
    delta = {**message, **({"tool_calls": deltas} if deltas else {})}
    events = [
        {**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**chunk, "choices": [{**choice, "delta": {}}]},
        {**chunk, "choices": [], "usage": usage},
    ]
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
    return "text/event-stream", "".join(lines).encode()
