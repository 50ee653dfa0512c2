"""A writable Hub on loopback: as much of the API as making, filling and reading a data-set repository takes.

A repository knows its commits, refuses one on a stale parent (412), and sends large files through LFS. Everything that
was received is kept, so that a test can look for what should never have been sent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

TOKEN = "hf_" + "goodtoken" * 4
START_TIMEOUT_S = 30.0


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    sha: str = hashlib.sha1(b"initial").hexdigest()

    def commit(self, title: str, changes: dict[str, bytes]) -> None:
        self.files |= changes
        self.commits.append(title)
        self.sha = hashlib.sha1(f"{self.sha}{title}{len(self.commits)}".encode()).hexdigest()


class Hub:
    """The server's state; `url` goes into `HF_ENDPOINT` before huggingface_hub is imported."""

    def __init__(self, lfs_from: int = 10 << 20) -> None:
        self.url = ""
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.received: list[bytes] = []
        """Path, headers but the authorization, and body of every request."""
        self.faults: list[dict[str, Any]] = []
        """`{"path": part of a path, "status": 503, "times": 2}`, and `headers` where wanted."""
        self.before_commit: list[Callable[[Hub], None]] = []
        """Called once each before a commit is looked at: somebody else's push."""
        self.lfs_from = lfs_from

    def repo(self, name: str) -> Repo:
        return self.repos[name]

    def app(self) -> FastAPI:
        app = FastAPI()
        app.middleware("http")(self._guard)
        app.post("/api/validate-yaml")(self._validate)
        app.post("/api/repos/create")(self._create)
        app.post("/api/datasets/{owner}/{name}/preupload/{revision}")(self._preupload)
        app.post("/datasets/{owner}/{name}.git/info/lfs/objects/batch")(self._batch)
        app.put("/lfs/{oid}")(self._put)
        app.post("/api/datasets/{owner}/{name}/commit/{revision}")(self._commit)
        app.get("/api/datasets/{owner}/{name}")(self._info)
        app.get("/api/datasets/{owner}/{name}/revision/{revision}")(self._info)
        app.get("/datasets/{owner}/{name}/resolve/{revision}/{path:path}")(self._resolve)
        app.head("/datasets/{owner}/{name}/resolve/{revision}/{path:path}")(self._resolve)
        return app

    async def _guard(self, request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        body = await request.body()
        headers = {name: value for name, value in request.headers.items() if name not in ("authorization", "host")}
        self.received.append(f"{request.url.path}?{request.url.query}\n{headers}\n".encode() + body)
        for fault in self.faults:
            if fault["times"] > 0 and fault["path"] in request.url.path:
                fault["times"] -= 1
                return JSONResponse({"error": "scripted"}, fault["status"], headers=fault.get("headers"))
        if not request.url.path.startswith("/lfs/") and request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _refusal(401, "Invalid credentials in Authorization header")
        return await call_next(request)

    async def _validate(self) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    async def _create(self, request: Request) -> Response:
        wanted = await request.json()
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.url}/datasets/{name}"
        if name in self.repos:
            return JSONResponse({"error": "You already created this dataset repo", "url": url}, 409)
        self.repos[name] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return JSONResponse({"url": url, "name": name, "id": name})

    async def _preupload(self, owner: str, name: str, request: Request) -> dict[str, Any]:
        files = self.repos[f"{owner}/{name}"].files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": self._mode(file["size"]),
                    "shouldIgnore": False,
                    "oid": self._oid(files[file["path"]]) if file["path"] in files else None,
                }
                for file in (await request.json())["files"]
            ]
        }

    def _mode(self, size: int) -> str:
        return "lfs" if size >= self.lfs_from else "regular"

    def _oid(self, data: bytes) -> str:
        if self._mode(len(data)) == "lfs":
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    async def _batch(self, request: Request) -> Response:
        objects = []
        for wanted in (await request.json())["objects"]:
            known = wanted["oid"] in self.lfs
            actions = {} if known else {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        answer = json.dumps({"transfer": "basic", "objects": objects})
        return Response(answer, media_type="application/vnd.git-lfs+json")

    async def _put(self, oid: str, request: Request) -> Response:
        data = await request.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return Response(status_code=400)
        self.lfs[oid] = data
        return Response()

    async def _commit(self, owner: str, name: str, request: Request) -> Response:
        if self.before_commit:
            self.before_commit.pop(0)(self)
        repo = self.repos[f"{owner}/{name}"]
        title, changes = "", {}
        for line in (await request.body()).splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, repo.sha):
                    return _refusal(412, "A commit has happened since. Please refresh and try again.")
            elif operation["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                changes[value["path"]] = self.lfs[value["oid"]]
        repo.commit(title, changes)
        url = f"{self.url}/datasets/{owner}/{name}/commit/{repo.sha}"
        return JSONResponse({"success": True, "commitUrl": url, "commitOid": repo.sha, "hookOutput": ""})

    async def _info(self, owner: str, name: str) -> Response:
        repo = self.repos.get(f"{owner}/{name}")
        if repo is None:
            return _refusal(404, "Repository not found", {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": path} for path in repo.files]
        about = {"_id": "1", "id": f"{owner}/{name}", "sha": repo.sha, "private": repo.private, "siblings": siblings}
        return JSONResponse({**about, "downloads": 0, "tags": []})

    async def _resolve(self, owner: str, name: str, path: str, request: Request) -> Response:
        repo = self.repos[f"{owner}/{name}"]
        if path not in repo.files:
            return _refusal(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
        data = repo.files[path]
        headers = {"ETag": f'"{self._oid(data)}"', "X-Repo-Commit": repo.sha, "Content-Length": str(len(data))}
        return Response(b"" if request.method == "HEAD" else data, headers=headers)


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": message}, status, headers={"X-Error-Message": message, **(headers or {})})


@contextlib.contextmanager
def hub_server(lfs_from: int = 10 << 20) -> Iterator[Hub]:
    """Serve a fresh Hub from a thread; `lfs_from` is the size from which a file goes through LFS."""
    hub = Hub(lfs_from)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        hub.url = f"http://127.0.0.1:{place.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(hub.app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, name="hub")
        thread.start()
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not server.started:
                assert thread.is_alive(), "the Hub's thread died"
                assert time.monotonic() < deadline, "the Hub did not start in time"
                time.sleep(0.01)
            yield hub
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the Hub's thread did not end"
