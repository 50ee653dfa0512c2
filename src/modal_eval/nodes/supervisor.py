"""Keeps a worker running where there is no systemd. Run by path, `python -I supervisor.py FOLDER -- COMMAND…`.

Goes into the background at once. SIGTERM and SIGUSR1 are passed on to the worker; one that ends with 0, or after SIGTERM, is not started
again. FOLDER gets `pid` (pid and start, in clock ticks since boot) and `log`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
LARGEST_LOG = 50 * 1024 * 1024


def main() -> None:
    folder, command = Path(sys.argv[1]), sys.argv[3:]
    if os.fork():
        return
    os.setsid()
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    fresh = folder / "pid.new"
    fresh.write_text(f"{os.getpid()} {ticks}\n")
    fresh.replace(folder / "pid")
    keep_running(command, folder)


def keep_running(command: list[str], folder: Path) -> None:
    stopping = False
    worker: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if worker is not None and worker.poll() is None:
            worker.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    pause = FIRST_PAUSE_S
    while not stopping:
        began = time.monotonic()
        with (folder / "log").open("wb" if too_long(folder / "log") else "ab") as log:
            worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            if stopping:  # asked between the test above and the start
                worker.terminate()
            code = worker.wait()
        if code == 0:
            return
        pause = FIRST_PAUSE_S if time.monotonic() - began > LONGEST_PAUSE_S else min(2 * pause, LONGEST_PAUSE_S)
        end = time.monotonic() + pause
        while not stopping and time.monotonic() < end:
            time.sleep(0.1)


def too_long(log: Path) -> bool:
    return log.is_file() and log.stat().st_size > LARGEST_LOG


if __name__ == "__main__":
    main()
