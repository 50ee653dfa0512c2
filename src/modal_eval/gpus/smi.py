"""The GPUs by the command `nvidia-smi`, where NVML cannot be loaded."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

from modal_eval.errors import GpuError
from modal_eval.gpus.records import Gpu, GpuProcess

TIMEOUT_S = 30.0
"""Without persistence mode the command wakes each of eight GPUs first, which takes some seconds."""
GPU_FIELDS = ("index", "uuid", "memory.total", "memory.used", "utilization.gpu", "mig.mode.current", "name")
PROCESS_FIELDS = ("gpu_uuid", "pid", "used_memory", "process_name")


def read() -> list[Gpu] | None:
    """Every GPU that `nvidia-smi` lists; `None` where there is no such command.

    Raises `GpuError` when the command fails or answers what cannot be read.
    """
    try:
        rows = list(query("--query-gpu=", GPU_FIELDS))
        processes = list(query("--query-compute-apps=", PROCESS_FIELDS)) if rows else []
    except FileNotFoundError:
        return None
    return [gpu(row, processes) for row in rows]


def gpu(row: list[str], processes: list[list[str]]) -> Gpu:
    index, uuid, total, used, use, mig, name = row
    return Gpu(
        index=int(index),
        uuid=uuid,
        name=name,
        total_mib=number(total),
        used_mib=number(used),
        utilization=number(use),
        processes=tuple(
            GpuProcess(number(pid) or 0, None, number(memory), command, None)
            for owner, pid, memory, command in processes
            if owner == uuid
        ),
        mig=mig.lower() == "enabled",
    )


def query(option: str, fields: tuple[str, ...]) -> Iterator[list[str]]:
    """The rows of one query. The field that may hold commas comes last, so that it stays in one piece."""
    command = ["nvidia-smi", option + ",".join(fields), "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise GpuError(
            f"nvidia-smi did not answer within {TIMEOUT_S:g} s; type it by hand to see what it does"
        ) from None
    if "No devices were found" in ran.stdout:
        return
    if ran.returncode:
        said = " ".join((ran.stdout + ran.stderr).split())
        raise GpuError(f"nvidia-smi failed with {ran.returncode}: {said[:500]}")
    for line in ran.stdout.splitlines():
        words = [word.strip() for word in line.split(",", len(fields) - 1)]
        if len(words) == len(fields):
            yield words
        elif line.strip():
            raise GpuError(
                f"nvidia-smi answered {line!r} to {option}{','.join(fields)}; is another program of its name in PATH?"
            )


def number(word: str) -> int | None:
    """`81920`, also with its unit; `None` for `[N/A]`, `[Not Supported]` and what else the driver does not tell."""
    found = re.match(r"\d+", word)
    return int(found.group()) if found else None
