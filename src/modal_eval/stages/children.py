"""Runs that another process of ours starts, watches and ends.

Not under a guardian, which ends whatever its process has started: a server that one run keeps for the next has to outlive
it. A child holds the reading end of a pipe instead; it ends in its own order when the writing end is gone, so also when its
parent was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE_S = 90.0
"""A run that is told to stop gives its server back in this time; after it, it is killed."""
POLL_S = 0.2


def run_child(words: list[str], log: Path, env: dict[str, str], stopping: threading.Event) -> int | None:
    """Run `python -m modal_eval.cli.requested WORDS` to its end and return its exit code; `None` if it was `stopping`."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "modal_eval.cli.requested", *words],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=env, start_new_session=True,
        )  # fmt: skip
    try:
        while (code := process.poll()) is None and not stopping.wait(POLL_S):
            pass
    finally:
        end(process)
    return code


def last_words(log: Path, begins_at: int = 0) -> str:
    """What a child complained of last in its `log`, of which the first `begins_at` bytes are of an earlier one's."""
    said = log.read_bytes()[begins_at:].decode(errors="replace").rpartition("modal-eval: ")[2].strip()
    return said or "it said nothing"


def end(process: subprocess.Popen[bytes]) -> None:
    """Let it end in order, then kill it with its group."""
    if process.stdin:
        process.stdin.close()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_with_parent() -> None:
    """In a child: take the end of standard input for a Ctrl-C."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        while True:  # again, for what was asked before anything listened
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(GRACE_S)

    threading.Thread(target=watch, daemon=True).start()
