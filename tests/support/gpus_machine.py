"""The stand-in for a machine's GPUs: what its driver would know, in the files of one folder.

Imports nothing of ours: it is copied beside the stand-ins for `nvidia-smi` and `pynvml`, which both read it. The folder
holds `apps.csv` with lines `gpu,pid,MiB,utilization` (a GPU is used for as long as that process lives; pid 0 is one in
another container, of which only the memory is seen), and the files `mig`, `fails`, `no-nvml`, `silent-nvml`, `na`,
whose presence says what is wrong with the machine.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "STAND_IN_GPUS"
COUNT = 8
TOTAL_MIB = 81_920
DRIVERS_MIB = 5
NAME = "NVIDIA A100-SXM4-80GB"


@dataclass(frozen=True)
class App:
    gpu: int
    pid: int
    mib: int
    utilization: int


def folder() -> Path:
    return Path(os.environ[VARIABLE])


def wrong(what: str) -> bool:
    return (folder() / what).exists()


def count() -> int:
    return int((folder() / "count").read_text()) if wrong("count") else COUNT


def uuid(index: int) -> str:
    return f"GPU-{index:08d}-0000-0000-0000-000000000000"


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def apps() -> list[App]:
    path = folder() / "apps.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [App(*map(int, line.split(","))) for line in lines]
    return [app for app in found if app.pid == 0 or alive(app.pid)]


def use(gpu: int, pid: int, mib: int = 60_000, utilization: int = 97) -> None:
    """A process begins to use a GPU."""
    with (folder() / "apps.csv").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{gpu},{pid},{mib},{utilization}\n")


def used_mib(gpu: int) -> int:
    return DRIVERS_MIB + sum(app.mib for app in apps() if app.gpu == gpu)


def utilization(gpu: int) -> int:
    return max((app.utilization for app in apps() if app.gpu == gpu), default=0)


def in_mig(gpu: int) -> bool:
    return wrong("mig") and str(gpu) in (folder() / "mig").read_text().split()


def nvidia_smi(arguments: list[str]) -> int:
    """Answer as the command does, for the queries in CSV without header and units."""
    with (folder() / "asked").open("a") as file:
        file.write(f"{time.monotonic()}\n")
    if wrong("fails"):
        sys.stdout.write("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")
        return 9
    if not count():
        sys.stdout.write("No devices were found\n")
        return 6
    assert arguments[1] == "--format=csv,noheader,nounits", arguments
    option, _, fields = arguments[0].partition("=")
    for row in gpu_rows() if option == "--query-gpu" else app_rows():
        sys.stdout.write(", ".join(row[field] for field in fields.split(",")) + "\n")
    return 0


def gpu_rows() -> list[dict[str, str]]:
    silent = wrong("na")
    return [
        {
            "index": str(index),
            "uuid": uuid(index),
            "name": NAME,
            "memory.total": "[N/A]" if silent else str(TOTAL_MIB),
            "memory.used": "[N/A]" if silent else str(used_mib(index)),
            "utilization.gpu": "[N/A]" if silent or in_mig(index) else str(utilization(index)),
            "mig.mode.current": "Enabled" if in_mig(index) else "[N/A]" if silent else "Disabled",
        }
        for index in range(count())
    ]


def app_rows() -> list[dict[str, str]]:
    memory = "[N/A]" if wrong("na") else None
    return [
        {
            "gpu_uuid": uuid(app.gpu),
            "pid": str(app.pid),
            "used_memory": memory or str(app.mib),
            "process_name": "py, thon",
        }
        for app in apps()
        if app.pid
    ]


if __name__ == "__main__":
    sys.exit(nvidia_smi(sys.argv[1:]))
