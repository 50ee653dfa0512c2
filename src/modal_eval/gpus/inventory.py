"""Which GPUs this machine has and who uses them: asked of NVML, else of `nvidia-smi`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from modal_eval.errors import GpuError
from modal_eval.gpus import nvml, smi
from modal_eval.gpus.records import Gpu, GpuProcess, user_of
from modal_eval.processes import start_ticks


def inventory() -> list[Gpu]:
    """Every GPU of this machine in the order of the PCI bus; an empty list where there is none.

    Raises `GpuError` when there is a driver that does not answer.
    """
    try:
        found = nvml.read()
    except nvml.NoNvml as silent:
        found_by_command = smi.read()
        if found_by_command is None and not silent.no_driver:
            raise GpuError(
                f"the NVIDIA driver does not answer: {silent}; `nvidia-smi` should say why (after an update of the "
                "driver the machine has to be started again)"
            ) from silent
        found = found_by_command or []
    return [described(gpu) for gpu in sorted(found, key=lambda gpu: gpu.index)]


def described(gpu: Gpu) -> Gpu:
    """The GPU with what this machine knows of its processes beyond what the driver tells."""
    processes = tuple(
        GpuProcess(one.pid, user_of(one.pid), one.used_mib, name_of(one.pid) or one.name, started_at(one.pid))
        for one in gpu.processes
    )
    return Gpu(gpu.index, gpu.uuid, gpu.name, gpu.total_mib, gpu.used_mib, gpu.utilization, processes, gpu.mig)


def visible(gpus: Sequence[Gpu], devices: str | None = None) -> list[Gpu]:
    """Those of `gpus` that this process may use: what `CUDA_VISIBLE_DEVICES` names, all where it is not set.

    Read as CUDA reads it: numbers or the beginnings of UUIDs, and nothing counts behind the first that names no GPU.
    `devices` is read in place of the variable. Numbers count in the order of the PCI bus.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES") if devices is None else devices
    if named is None:
        return list(gpus)
    found: list[Gpu] = []
    for word in (part.strip() for part in named.split(",")):
        fitting = [gpu for gpu in gpus if word and (str(gpu.index) == word or gpu.uuid.startswith(word))]
        if len(fitting) != 1 or fitting[0] in found:
            break
        found.append(fitting[0])
    return found


def name_of(pid: int) -> str:
    """The command line of a process, or its short name; empty when it cannot be seen."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace").strip() or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def started_at(pid: int) -> str | None:
    """When a process was started, ISO 8601 in UTC."""
    if not (ticks := start_ticks(pid)):
        return None
    seconds_up = float(Path("/proc/uptime").read_text().split()[0])
    age_s = seconds_up - ticks / os.sysconf("SC_CLK_TCK")
    return datetime.fromtimestamp(datetime.now(UTC).timestamp() - age_s, UTC).isoformat(timespec="seconds")
