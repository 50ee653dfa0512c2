"""The stand-in for nvidia-ml-py: the calls that we make of it, answered by `gpus_machine`."""

from __future__ import annotations

from types import SimpleNamespace

import gpus_machine as machine

MIB = 1 << 20
NVML_DEVICE_MIG_DISABLE, NVML_DEVICE_MIG_ENABLE = 0, 1
nvmlMemory_v2 = 0x2000028  # noqa: N816 - NVML's own names


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801, N818
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801, N818
    pass


def unless_silent(value):
    if machine.wrong("na"):
        raise NVMLError_NotSupported("Not Supported")
    return value


def nvmlInit():  # noqa: N802
    if machine.wrong("no-nvml"):
        raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
    if machine.wrong("silent-nvml"):
        raise NVMLError("Driver/library version mismatch")


def nvmlShutdown():  # noqa: N802
    pass


def nvmlDeviceGetCount():  # noqa: N802
    return machine.count()


def nvmlDeviceGetHandleByIndex(index):  # noqa: N802
    return index


def nvmlDeviceGetUUID(handle):  # noqa: N802
    return machine.uuid(handle)


def nvmlDeviceGetName(handle):  # noqa: N802
    return machine.NAME


def nvmlDeviceGetMemoryInfo(handle, version=None):  # noqa: N802
    return unless_silent(SimpleNamespace(total=machine.TOTAL_MIB * MIB, used=machine.used_mib(handle) * MIB))


def nvmlDeviceGetUtilizationRates(handle):  # noqa: N802
    return unless_silent(SimpleNamespace(gpu=machine.utilization(handle)))


def nvmlDeviceGetMigMode(handle):  # noqa: N802
    mode = NVML_DEVICE_MIG_ENABLE if machine.in_mig(handle) else NVML_DEVICE_MIG_DISABLE
    return unless_silent([mode, mode])


def nvmlDeviceGetComputeRunningProcesses(handle):  # noqa: N802
    memory = None if machine.wrong("na") else 1
    return [
        SimpleNamespace(pid=app.pid, usedGpuMemory=memory and app.mib * MIB)
        for app in machine.apps()
        if app.gpu == handle and app.pid
    ]
