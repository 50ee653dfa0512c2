"""A server as a GPU sees it: shows up in the driver's list only after a while, and is ended from outside.

`python gpus_server.py AUDIT_DIR DELAY_S [worker] [stubborn]`. Its environment names its GPUs. From its first moment it holds a lock
of the auditor's for each of them, which has nothing to do with our leases; one that it cannot get means that another
server is on the same GPU, and is written down. With `worker`, a child in a session of its own uses the GPU, as vLLM's do. A
`stubborn` one takes its time when it is told to end.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

import gpus_machine


def main() -> None:
    audit, delay_s, kinds = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    if "stubborn" in kinds:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gpus = [int(word) for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",")]
    for gpu in gpus:
        lock = os.open(audit / f"gpu{gpu}", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (audit / f"violation-{gpu}-{os.getpid()}").touch()
    if "worker" in kinds and os.fork() == 0:
        os.setsid()
    time.sleep(delay_s)
    for gpu in gpus:
        gpus_machine.use(gpu, os.getpid())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    time.sleep(600)


if __name__ == "__main__":
    main()
