"""A server that answers every OpenAI-shaped call with one word, for a rehearsal without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORD = "0"


class OneWord(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": WORD}} if "messages" in asked else {"text": WORD}
        )
        choices = [{"index": at, "finish_reason": "stop", **said} for at in range(int(asked.get("n") or 1))]
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        kind = "chat.completion" if "messages" in asked else "text_completion"
        head = {"id": "rehearsal", "object": kind, "created": 0, "model": asked.get("model", "rehearsal")}
        self._send({**head, "choices": choices, "usage": usage})

    def do_GET(self) -> None:
        self._send({"object": "list", "data": []})

    def _send(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """A rehearsal is not logged."""


@contextmanager
def one_word_server() -> Iterator[str]:
    """The base URL of a server on this machine, on a port that the kernel chose."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), OneWord)
    thread = threading.Thread(target=server.serve_forever, name="rehearsal", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
