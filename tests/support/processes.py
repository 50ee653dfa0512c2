"""Which processes a test has started: by a mark that every child inherits, wherever it hides."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

MARK_VARIABLE = "MODAL_EVAL_TEST_MARK"


class Mark:
    """A fresh value for `MODAL_EVAL_TEST_MARK`; pass `mark.env` to what the test starts."""

    def __init__(self) -> None:
        self.value = uuid.uuid4().hex

    @property
    def env(self) -> dict[str, str]:
        """The whole environment of this process, with the mark."""
        return {**os.environ, MARK_VARIABLE: self.value}

    def processes(self) -> dict[int, str]:
        """Living processes with the mark: command lines by pid. Zombies have ended and do not count."""
        wanted = f"{MARK_VARIABLE}={self.value}".encode()
        return {pid: command_line(pid) for pid in pids() if wanted in _environment(pid) and is_running(pid)}

    def wait_until_gone(self, timeout: float = 20.0) -> dict[int, str]:
        """Poll until none is left; returns those that stayed, so that `assert mark.wait_until_gone() == {}` names them."""
        deadline = time.monotonic() + timeout
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left


def until(condition: Callable[[], object], within: float = 60.0) -> None:
    """Return once `condition` holds; fail the test where it does not within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"it did not come to that within {within:g} s"
        time.sleep(0.02)


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def command_line(pid: int) -> str:
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def is_running(pid: int) -> bool:
    """Whether `pid` is there and is no zombie."""
    status = _read(pid, "stat").rpartition(b")")[2].split()
    return bool(status) and status[0] not in (b"Z", b"X")


def descendants(pid: int) -> set[int]:
    """Living children of `pid`, theirs, and so on; one whose parent has died is found by its mark alone."""
    parents = {
        each: int(fields[1]) for each in pids() if len(fields := _read(each, "stat").rpartition(b")")[2].split()) > 1
    }
    found: set[int] = set()
    frontier = {pid}
    while frontier := {each for each, parent in parents.items() if parent in frontier} - found:
        found |= frontier
    return {each for each in found if is_running(each)}


def _environment(pid: int) -> list[bytes]:
    return _read(pid, "environ").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
