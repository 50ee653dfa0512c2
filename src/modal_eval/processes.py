"""Processes that cannot outlive us, however we die."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

GUARDIAN = Path(__file__).with_name("guardian.py")
POLL_S = 0.02


class OwnedProcess:
    """A command under a guardian that ends its whole tree when it is stopped or when this process is gone."""

    def __init__(self, guardian: subprocess.Popen[bytes], pid: int, lifeline: int, report: int, grace_s: float) -> None:
        self.pid = pid
        """The command's own pid, which leads its own process group and session."""
        self.started = start_ticks(pid)
        self.stdin: BinaryIO | None = None
        self.stdout: BinaryIO | None = None
        self._guardian = guardian
        self._lifeline: int | None = lifeline
        self._report = report
        self._code: int | None = None
        self._grace_s = grace_s
        self._lock = threading.Lock()
        """One thread may watch the process while another stops it."""

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        *,
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdin_pipe: bool = False,
        stdout_pipe: bool = False,
        grace_s: float = 10.0,
        hold_fds: Sequence[int] = (),
    ) -> Self:
        """Start `command`; stderr, and stdout unless piped, are appended to `log_path`.

        On stop it has `grace_s` seconds to end by itself after SIGTERM. `hold_fds` stay open in the command and in its
        guardian, so that a lock on them lasts as long as the command, also when this process is gone. Raises
        `FileNotFoundError` or `PermissionError` when the command cannot be started.
        """
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            alive_end, lifeline = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, alive_end)
            ours.callback(os.close, lifeline)
            report, report_end = os.pipe2(os.O_CLOEXEC)
            theirs.callback(os.close, report_end)
            ours.callback(os.close, report)
            log = theirs.enter_context(log_path.open("ab")) if log_path else subprocess.DEVNULL
            words = [str(word) for word in (os.getpid(), alive_end, report_end, grace_s)]
            words.append(",".join(map(str, hold_fds)))
            guardian = subprocess.Popen(
                [sys.executable, "-I", str(GUARDIAN), *words, "--", *command],
                stdin=subprocess.PIPE if stdin_pipe else subprocess.DEVNULL,
                stdout=subprocess.PIPE if stdout_pipe else log,
                stderr=log,
                env=dict(env) if env is not None else None,
                cwd=cwd,
                pass_fds=(alive_end, report_end, *hold_fds),
                start_new_session=True,
            )
            theirs.close()  # from here on, the other ends are the guardian's alone
            word, _, rest = _first_line(report).partition(" ")
            if word != "pid":
                guardian.communicate()
                raise FileNotFoundError(f"{command[0]} cannot be started: {rest or 'its guardian died'}")
            ours.pop_all()
        owned = cls(guardian, int(rest), lifeline, report, grace_s)
        owned.stdin = guardian.stdin  # type: ignore[assignment]
        owned.stdout = guardian.stdout  # type: ignore[assignment]
        return owned

    def poll(self) -> int | None:
        """The command's exit code (negative: the signal that ended it), or `None` while it runs."""
        with self._lock:
            if self._code is None and self._guardian.poll() is not None:
                self._code = self._read_code()
            return self._code

    def _read_code(self) -> int:
        heard = b""
        while chunk := os.read(self._report, 4096):
            heard += chunk
        os.close(self._report)
        self._let_go()
        found = re.search(rb"exit (-?\d+)", heard)
        return int(found.group(1)) if found else -signal.SIGKILL  # the guardian was killed, and its command with it

    def _let_go(self, grace_s: float | None = None) -> None:
        if self._lifeline is None:
            return
        if grace_s is not None:
            with contextlib.suppress(BrokenPipeError):  # the guardian has ended already
                os.write(self._lifeline, f"{grace_s:g}".encode())
        os.close(self._lifeline)
        self._lifeline = None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the command. Raises `TimeoutError` after `timeout` seconds."""
        try:
            self._guardian.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s") from None
        code = self.poll()
        return -signal.SIGKILL if code is None else code

    def stop(self, grace_s: float | None = None) -> int:
        """End the whole tree, with `grace_s` in place of the start's, and return the exit code. May be called twice."""
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with self._lock:
            self._let_go(grace_s)
        return self.wait((self._grace_s if grace_s is None else grace_s) + 30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _first_line(descriptor: int) -> str:
    heard = b""
    while not heard.endswith(b"\n"):
        chunk = os.read(descriptor, 1)
        if not chunk:
            break
        heard += chunk
    return heard.decode(errors="replace").strip()


def start_ticks(pid: int) -> float:
    """When `pid` was started, in clock ticks since boot; 0 when there is no such process or it is a zombie.

    With the pid it names a process for good: a pid alone is given to another process later.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return 0.0 if fields[0] in "ZX" else float(fields[19])


def is_alive(pid: int, started: float) -> bool:
    """Whether the process that had `pid` since `started` still runs."""
    return pid > 0 and started > 0 and start_ticks(pid) == started


def boot_id() -> str:
    """Changes with each boot; before it, no pid means anything."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def kill_group(pid: int, started: float, grace_s: float = 10.0) -> bool:
    """End the session that `pid` began at `started`, TERM then KILL; `False` when nothing of it was left.

    Members that outlived their leader are ended as well: the kernel gives no new process a pid that still names a
    session, so they are known by it for as long as one of them lives.
    """
    if not (left := _session(pid, started)):
        return False
    _signal(left, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while (left := _session(pid, started)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    while left := _session(pid, started):
        _signal(left, signal.SIGKILL)
        time.sleep(POLL_S)
    return True


def guardian_of(pid: int) -> tuple[int, float]:
    """Pid and start of the guardian that `pid` has as its parent; zeros when it has none, or not any more."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        ours = str(GUARDIAN).encode() in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return 0, 0.0
    return (parent, start_ticks(parent)) if ours else (0, 0.0)


def wait_until_ended(processes: Iterable[tuple[int, float]], timeout: float) -> bool:
    """Whether all of `processes`, by pid and start, have ended within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    left = list(processes)
    while (left := [one for one in left if is_alive(*one)]) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return not left


def _signal(processes: Mapping[int, float], number: signal.Signals) -> None:
    for pid, started in processes.items():
        if is_alive(pid, started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def _session(leader: int, started: float) -> dict[int, float]:
    """The living members of a session, each with its start; none when the pid belongs to another process today."""
    if leader <= 0 or started <= 0 or start_ticks(leader) not in (0.0, started):
        return {}
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended while we looked
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX" and float(fields[19]) >= started:
            found[int(stat.parent.name)] = float(fields[19])
    return found


def masked(command: Iterable[str]) -> str:
    """The command for a log, with the values of keys and tokens left out."""
    shown, hide = [], False
    for word in command:
        name, has_value, _ = word.partition("=")
        secret = re.search(r"(?i)(api[-_]?key|token|secret|password)$", name) is not None
        shown.append("***" if hide else f"{name}=***" if secret and has_value else word)
        hide = secret and not has_value and word.startswith("-")
    return " ".join(shown)


def last_lines(path: Path, count: int = 8) -> str:
    """The end of a log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join([line for line in lines if line.strip()][-count:])


def free_port() -> int:
    """A port that the kernel says is free; the server that is started on it finds out if somebody was faster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
