"""A real proxy process in front of a scripted upstream, and a harness of one line."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from modal_eval.proxy import Proxy, ProxySettings

IDENTITY = {"model": {"id": "stub"}, "sampling": {"temperature": 1.0}}
FAST: dict[str, Any] = {"retry_base_s": 0.02, "retry_cap_s": 0.2, "call_timeout_s": 60.0, "retries": 5}


def proxy_settings(folder: Path, upstreams: Sequence[str], **changes: Any) -> ProxySettings:
    """Settings for one journal in `folder`; waits are shortened."""
    given = {"identity": IDENTITY, "model": "stub", "api_key_env": None, "max_in_flight": 64, **FAST, **changes}
    return ProxySettings(
        journal=folder / "checkpoint.jsonl", log_path=folder / "logs" / "proxy.log", upstreams=tuple(upstreams), **given
    )


@contextlib.contextmanager
def running_proxy(folder: Path, *upstreams: str, **changes: Any) -> Iterator[Proxy]:
    proxy = Proxy.start(proxy_settings(folder, upstreams, **changes))
    try:
        yield proxy
    finally:
        proxy.stop()


def body_of(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "stub", "messages": [{"role": "user", "content": text}], **fields}


def ask(
    proxy: Proxy, text: str, tag: str = "", *, path: str = "/chat/completions", timeout: float = 60.0, **fields: Any
) -> httpx.Response:
    """One call, as a harness makes it."""
    headers = {"X-Modal-Eval-Rollout": tag} if tag else {}
    with httpx.Client(trust_env=False, verify=False, timeout=timeout) as client:  # no certificates to read: it is http
        return client.post(proxy.base_url + path, json=body_of(text, **fields), headers=headers)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == httpx.codes.OK, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def ask_all(proxy: Proxy, calls: Sequence[tuple[str, str]], *, at_once: int = 16, **fields: Any) -> list[str | None]:
    """The whole answers to (text, tag) pairs, in their order; `None` for a call that found no proxy any more."""

    def one(call: tuple[str, str]) -> str | None:
        try:
            response = ask(proxy, *call, **fields)
        except httpx.TransportError:
            return None
        assert text_of(response)
        return response.text

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, calls))


@contextlib.contextmanager
def in_background(work: Callable[[], Any]) -> Iterator[Future[Any]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(work)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.01)


@contextlib.contextmanager
def redirecting(location: str) -> Iterator[str]:
    """A server that answers every POST with a 303 to `location`; gives its base URL."""

    class Redirect(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(303)
            self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing to tell."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
