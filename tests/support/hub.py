"""A read-only Hub on loopback that serves data sets and models from memory: enough for huggingface_hub and datasets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Hub:
    commit: str
    files: dict[str, dict[str, bytes]]
    """Content of each file, by the name of a data set or a model, and its own."""
    url: str = ""
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(commit: str, files: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(commit, files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            hub.requests.append(format % args)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            repository = self.repository()
            wanted = set(body.get("paths", [])) if repository else set()
            self.answer([entry for entry in self.entries(repository) if entry["path"] in wanted])

        def do_GET(self) -> None:
            path = unquote(self.path.split("?")[0])
            repository = self.repository()
            if repository is None:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            if "/resolve/" in path:
                _, _, rest = path.partition("/resolve/")
                _, _, name = rest.partition("/")
                content = hub.files[repository].get(name)
                if content is None:
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                return self.send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            if "/tree/" in path:
                return self.answer(self.entries(repository))
            siblings = [{"rfilename": name} for name in hub.files[repository]]
            return self.answer(
                {"id": repository, "sha": hub.commit, "siblings": siblings, "tags": [], "private": False}
            )

        def repository(self) -> str | None:
            path = unquote(self.path)
            return next(
                (
                    name
                    for name in hub.files
                    if f"/datasets/{name}" in path or path.startswith((f"/api/models/{name}", f"/{name}/resolve/"))
                ),
                None,
            )

        def entries(self, repository: str | None) -> list[dict[str, object]]:
            return [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in hub.files.get(repository or "", {}).items()
            ]

        def answer(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "X-Repo-Commit": hub.commit, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(10)
