"""One of several processes that compete for GPUs: `python -m tests.support.gpus_client JOBS_DIR AUDIT_DIR PATIENCE_S`.

Runs every job of the folder that is not done yet, all at once. A job is a file `NAME.json` with how many GPUs it wants
(`count`) and for how long (`hold_s`); it is done when `NAME.done` is there, which says when it asked, got its GPUs, and
gave them back. For a job's time a real server, under its guardian, holds the lease.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

from modal_eval import gpus
from modal_eval.gpus import taking
from modal_eval.processes import OwnedProcess

SERVER = Path(__file__).with_name("gpus_server.py")


def run_job(path: Path, audit: Path) -> None:
    """Do one job; it stays owed when its server or its guardian is killed, in the middle or while it starts."""
    job = json.loads(path.read_text())
    asked = time.monotonic()
    with gpus.take(job["count"], run=path.stem, what="a test") as lease, contextlib.suppress(FileNotFoundError):
        got = time.monotonic()
        command = [sys.executable, str(SERVER), str(audit), str(random.uniform(0, 0.6)), "stubborn"]
        env = {**os.environ, **lease.variables}
        with OwnedProcess.start(command, env=env, grace_s=0.5, hold_fds=lease.fds, stdout_pipe=True) as server:
            assert server.stdout is not None
            if server.stdout.readline() != b"ready\n":
                return
            time.sleep(job["hold_s"])
        done = {"asked": asked, "got": got, "gave_back": time.monotonic(), "gpus": job["count"]}
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(done))
        temporary.replace(path.with_suffix(".done"))


def main() -> None:
    jobs, audit, taking.PATIENCE_S = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    while owed := [path for path in sorted(jobs.glob("*.json")) if not path.with_suffix(".done").exists()]:
        threads = [threading.Thread(target=run_job, args=(path, audit)) for path in owed]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
