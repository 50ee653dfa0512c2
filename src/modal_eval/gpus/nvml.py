"""The GPUs by NVML, the driver's own library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pynvml

from modal_eval.gpus.records import Gpu, GpuProcess

MIB = 1 << 20


class NoNvml(Exception):  # noqa: N818 - a state of the machine, not a fault
    """NVML is not to be had on this machine."""

    def __init__(self, error: Exception, *, no_driver: bool) -> None:
        super().__init__(str(error))
        self.no_driver = no_driver
        """The library is not installed: a machine without NVIDIA's driver, where nothing is wrong."""


def read() -> list[Gpu]:
    """Every GPU that NVML lists. Raises `NoNvml`; a single value that the driver does not tell is `None`."""
    with session():
        count = told(pynvml.nvmlDeviceGetCount) or 0
        return [gpu for index in range(count) if (gpu := one(index)) is not None]


@contextmanager
def session() -> Iterator[None]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        absent = isinstance(error, pynvml.NVMLError_LibraryNotFound)
        raise NoNvml(error, no_driver=absent) from error
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def one(index: int) -> Gpu | None:
    """GPU number `index`; `None` for one that has fallen off the bus."""
    handle = told(pynvml.nvmlDeviceGetHandleByIndex, index)
    uuid = told(pynvml.nvmlDeviceGetUUID, handle) if handle is not None else None
    if uuid is None:
        return None
    memory = told(pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
    if memory is None:  # a driver older than 510 knows only the first version
        memory = told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    use = told(pynvml.nvmlDeviceGetUtilizationRates, handle)
    mig = told(pynvml.nvmlDeviceGetMigMode, handle)
    return Gpu(
        index=index,
        uuid=text(uuid),
        name=text(told(pynvml.nvmlDeviceGetName, handle) or "unknown"),
        total_mib=None if memory is None else memory.total // MIB,
        used_mib=None if memory is None else memory.used // MIB,
        utilization=None if use is None else use.gpu,
        processes=tuple(map(process, told(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ())),
        mig=mig is not None and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
    )


def process(found: Any) -> GpuProcess:
    used = found.usedGpuMemory
    return GpuProcess(found.pid, None, None if used is None else used // MIB, "", None)


def told(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers; `None` where it does not know, may not say, or is too old for the question."""
    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None


def text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
