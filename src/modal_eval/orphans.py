"""Ends what a killed worker left: a process of its own that outlives the worker and nothing else.

Run by path, `python -I orphans.py GRACE_S`. Each line on stdin is `+ PID TICKS` for a flow's process that was started, or
`- PID` for one that has ended. `bye` is a worker that has nothing left. The end of stdin without it is a worker that was killed: then
each flow is asked to end (SIGTERM: it gives its servers back and says that it crashed), and is killed after GRACE_S.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

POLL_S = 0.1


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the worker, which decides
    flows: dict[int, float] = {}
    for line in sys.stdin:
        match line.split():
            case ["+", pid, ticks]:
                flows[int(pid)] = float(ticks)
            case ["-", pid]:
                flows.pop(int(pid), None)
            case ["bye"]:
                return
    end(flows, time.monotonic() + float(sys.argv[1]))


def end(flows: dict[int, float], deadline: float) -> None:
    left = {pid for pid, ticks in flows.items() if started(pid) == ticks}
    for pid in left:
        send(pid, signal.SIGTERM)
    while left := {pid for pid in left if started(pid) == flows[pid]}:
        if time.monotonic() >= deadline:
            for pid in left:
                send(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def started(pid: int) -> float:
    """As `modal_eval.processes.start_ticks`, which this script cannot import."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return 0.0 if fields[0] in "ZX" else float(fields[19])


if __name__ == "__main__":
    main()
