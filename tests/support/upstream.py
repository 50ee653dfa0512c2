"""A scripted OpenAI-compatible upstream, in a thread of the test or in a process of its own.

    with upstream(latency=0.1) as server:                       # ends with the block
        server.script(rules=[{"behaviour": {"status": 503}, "asks": 1}])
        ...
        assert server.stats()["repeated_after_finish"] == {}

`python -m tests.support.upstream --port-file FILE` serves until it is ended and writes
`{"url", "control_url", "pid"}` to FILE once it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx

from modal_eval.processes import OwnedProcess, last_lines
from tests.support.upstream_server import UpstreamServer

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0


class Upstream:
    """A test's view of the server, the same for a thread and for a process."""

    def __init__(self, url: str, control_url: str) -> None:
        self.url = url
        """Root of the API, without `/v1`."""
        self.base_url = f"{url}/v1"
        self._control = control_url
        self.model = "stub"

    def script(
        self,
        default: dict[str, Any] | None = None,
        rules: list[dict[str, Any]] | None = None,
        known: dict[str, str] | None = None,
    ) -> None:
        """Change the default `Behaviour`, the `Rule`s or the known answers; what is not given stays."""
        given = {"default": default, "rules": rules, "known": known}
        self._post({name: value for name, value in given.items() if value is not None})

    def outage(self, seconds: float) -> None:
        """Cut all connections and refuse new ones for so long; the control port goes on."""
        self._post({"outage": seconds})

    def stats(self) -> dict[str, Any]:
        """`posts, gets, in_flight, max_in_flight, keys, finished, repeated_after_finish`; a key is `tag:digest`."""
        return dict(self._get("/_stats"))

    def log(self) -> list[dict[str, Any]]:
        """One entry a POST: `number, at, path, tag, digest, authorized, answered, finished`."""
        return list(self._get("/_log"))

    def wait_for_posts(self, count: int, timeout: float = 60.0) -> None:
        """Return once so many calls have arrived. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while (seen := self.stats()["posts"]) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{seen} of {count} calls arrived within {timeout} s")
            time.sleep(0.02)

    def _get(self, path: str) -> Any:
        return httpx.get(self._control + path, timeout=30).raise_for_status().json()

    def _post(self, script: dict[str, Any]) -> None:
        answer = httpx.post(f"{self._control}/_script", json=script, timeout=30)
        if answer.status_code != httpx.codes.OK:
            raise ValueError(answer.text)


@contextlib.contextmanager
def upstream(
    *, model: str = "stub", api_key: str | None = None, known: dict[str, str] | None = None, **default: Any
) -> Iterator[Upstream]:
    """Serve from a thread of this process; `default` are fields of `Behaviour`."""
    started: Future[tuple[UpstreamServer, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        server, ended = UpstreamServer(model, api_key), asyncio.Event()
        try:
            server.script.update({"default": default, "known": known or {}})
            await server.start()
        except BaseException as error:
            started.set_exception(error)
            raise
        started.set_result((server, asyncio.get_running_loop(), ended))
        await ended.wait()
        await server.stop()

    def run() -> None:
        with contextlib.suppress(ValueError):  # a wrong script is raised in the test, through `started`
            asyncio.run(serve())

    thread = threading.Thread(target=run, name="upstream")
    thread.start()
    server, loop, ended = started.result(START_TIMEOUT_S)
    view = Upstream(f"http://127.0.0.1:{server.port}", f"http://127.0.0.1:{server.control_port}")
    view.model = model
    try:
        yield view
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        assert not thread.is_alive(), "the upstream's thread did not end"


@contextlib.contextmanager
def upstream_process(
    folder: Path,
    *,
    model: str = "stub",
    api_key: str | None = None,
    known: dict[str, str] | None = None,
    **default: Any,
) -> Iterator[Upstream]:
    """Serve from a process of its own, which outlives the code under test but not the test."""
    port_file, log = folder / f"upstream-{os.urandom(4).hex()}.json", folder / "upstream.log"
    command = [
        sys.executable, "-m", "tests.support.upstream", "--port-file", str(port_file), "--model", model,
        "--script", json.dumps({"default": default, "known": known or {}}),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), **({"UPSTREAM_API_KEY": api_key} if api_key else {})}
    with OwnedProcess.start(command, log_path=log, env=env, cwd=ROOT) as process:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not port_file.exists():
            assert process.poll() is None, f"the upstream died:\n{last_lines(log)}"
            assert time.monotonic() < deadline, "the upstream did not start in time"
            time.sleep(0.02)
        place = json.loads(port_file.read_text())
        view = Upstream(place["url"], place["control_url"])
        view.model = model
        yield view


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="stub")
    parser.add_argument("--script", type=json.loads, default={})
    args = parser.parse_args()
    server = UpstreamServer(args.model, os.environ.get("UPSTREAM_API_KEY"))
    server.script.update(args.script)
    await server.start(args.port)
    root = "http://127.0.0.1"
    place = {"url": f"{root}:{server.port}", "control_url": f"{root}:{server.control_port}", "pid": os.getpid()}
    partial = args.port_file.with_suffix(".partial")
    partial.write_text(json.dumps(place))
    partial.replace(args.port_file)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
