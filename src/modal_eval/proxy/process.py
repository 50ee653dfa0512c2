"""The proxy as its owner sees it: a process that ends with us."""

from __future__ import annotations

import json
import os
import select
import sys
import time
from typing import Any, Self

import httpx

from modal_eval import errors
from modal_eval.errors import JournalError, ModalEvalError
from modal_eval.processes import OwnedProcess, last_lines
from modal_eval.proxy.settings import ProxySettings

START_TIMEOUT_S = 120.0
"""Opening a journal of a million calls takes seconds; a folder on a slow network share, longer."""
CONTROL_TIMEOUT_S = 30.0
GRACE_S = 5.0
NO_LOGINS = {"NETRC": os.devnull}
"""The key of `infra.api_key_env` is the one that goes upstream: a `~/.netrc` with a login for the same host gets into its way."""


class Proxy:
    """A running proxy."""

    def __init__(self, process: OwnedProcess, port: int, settings: ProxySettings) -> None:
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self.pid = process.pid
        self._root = f"http://127.0.0.1:{port}"
        self._process = process
        self._settings = settings
        self._client = httpx.Client(timeout=CONTROL_TIMEOUT_S, trust_env=False)

    @classmethod
    def start(cls, settings: ProxySettings) -> Self:
        """Start the process and return once it takes calls.

        Raises what keeps it from starting: `RunLockedError`, `IdentityError`, `ConfigError` for a key that is not there,
        `JournalError`.
        """
        settings.log_path.parent.mkdir(parents=True, exist_ok=True)
        process = OwnedProcess.start(
            [sys.executable, "-m", "modal_eval.proxy"],
            log_path=settings.log_path, env=os.environ | NO_LOGINS, stdin_pipe=True, stdout_pipe=True, grace_s=GRACE_S,
        )  # fmt: skip
        try:
            return cls(process, first_word(process, settings)["port"], settings)
        except BaseException:
            process.stop()
            raise

    def stats(self) -> dict[str, Any]:
        """Counts, tokens, latencies and faults since the start. Raises `JournalError` when the proxy is gone."""
        found: dict[str, Any] = self._ask("GET", "/control/stats").json()
        return found

    def begin_pass(self) -> None:
        """A harness starts from its beginning: equal requests are counted from the first one again."""
        self._ask("POST", "/control/begin-pass")

    def _ask(self, method: str, path: str) -> httpx.Response:
        try:
            return self._client.request(method, self._root + path).raise_for_status()
        except httpx.HTTPError as error:
            raise JournalError(self.exit_message() or f"the proxy does not answer {path}: {error}") from error

    def alive(self) -> bool:
        return self._process.poll() is None

    def exit_message(self) -> str | None:
        """What to tell when the process has ended by itself; `None` while it runs."""
        if (code := self._process.poll()) is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        return f"the proxy (pid {self.pid}) {how}; its log is {self._settings.log_path}; `modal-eval resume` goes on"

    def stop(self) -> None:
        """End the process; what is in flight upstream is given up, what was finished is on disk. May be called twice."""
        self._process.stop()
        self._client.close()


def first_word(process: OwnedProcess, settings: ProxySettings) -> dict[str, Any]:
    """What the process says when it is ready; raises the error that it names instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    heard = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        process.stdin.write(settings.to_json().encode() + b"\n")
        process.stdin.flush()
        while not heard.endswith(b"\n"):
            left = deadline - time.monotonic()
            if not select.select([process.stdout], [], [], max(0.0, left))[0]:
                raise JournalError(
                    f"the proxy is not ready after {START_TIMEOUT_S:g} s; its log is {settings.log_path}"
                )
            if not (part := os.read(process.stdout.fileno(), 4096)):
                break
            heard += part
    except BrokenPipeError:
        pass  # it died before it read its settings: told below
    if not heard.endswith(b"\n"):
        code = process.stop()
        raise JournalError(f"the proxy exited with {code}; the end of its log:\n{last_lines(settings.log_path)}")
    said: dict[str, Any] = json.loads(heard)
    if "error" in said:
        raise named_error(said["kind"], said["error"])
    return said


def named_error(kind: str, message: str) -> ModalEvalError:
    found = getattr(errors, kind, JournalError)
    error: ModalEvalError = found(message)
    return error
