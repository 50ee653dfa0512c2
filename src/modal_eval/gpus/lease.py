"""A held lease: some GPUs, and the locks that make them this process's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

from modal_eval.gpus import history
from modal_eval.gpus.folder import Folder, write_text
from modal_eval.gpus.records import Gpu, Holder

MARK_VARIABLE = "MODAL_EVAL_GPU_LEASE"
"""In the environment of every process below a server of ours: by it a leftover is known to be ours."""


@dataclass(frozen=True)
class HeldGpu:
    """One GPU of a lease and the descriptor whose lock holds it."""

    gpu: Gpu
    fd: int


class GpuLease:
    """GPUs that nobody else of us takes until `release`, or until this process and its servers have ended.

    The kernel keeps a lock for as long as any process has its descriptor open. Start a server with
    `OwnedProcess.start(..., hold_fds=lease.fds, env={**env, **lease.variables})`: then its GPUs stay taken until it has
    really ended, also when this process is killed before.
    """

    def __init__(self, folder: Folder, holder: Holder, held: Sequence[HeldGpu]) -> None:
        self._folder = folder
        self._holder = holder
        self._held = list(held)
        self._write()

    def _write(self) -> None:
        for one in self._held:
            write_text(one.fd, {**asdict(self._holder), "uuid": one.gpu.uuid, "index": one.gpu.index})

    @property
    def lease_id(self) -> str:
        return self._holder.lease_id

    @property
    def indices(self) -> tuple[int, ...]:
        """Numbers of the GPUs in the order of the PCI bus; none after `release`."""
        return tuple(one.gpu.index for one in self._held)

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(one.gpu.uuid for one in self._held)

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that a server of these GPUs has to inherit."""
        return tuple(one.fd for one in self._held)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a server on these GPUs.

        Numbers, because vLLM reads no UUIDs, and the order in which they count: CUDA's own order is another one on a
        machine of mixed GPUs.
        """
        owner = f"{self._holder.pid}:{self._holder.started:.0f}"
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, self.indices)),
            MARK_VARIABLE: f"{self._folder.path}:{self.lease_id}:{owner}",
        }

    def split(self, each: int) -> list[GpuLease]:
        """Leases of `each` GPUs, one for each replica, in place of this one, which is left without any.

        Raises `ValueError` when the GPUs cannot be divided so.
        """
        if each < 1 or len(self._held) % each:
            raise ValueError(f"{len(self._held)} GPUs cannot be divided into parts of {each}")
        held, self._held = self._held, []
        return [GpuLease(self._folder, self._holder, held[at : at + each]) for at in range(0, len(held), each)]

    def release(self) -> None:
        """Give the GPUs back, as far as this process is concerned. May be called twice.

        The descriptors are closed and never unlocked: that would free a GPU whose server still has it open.
        """
        indices = self.indices
        while self._held:
            os.close(self._held.pop().fd)
        if indices:
            history.note(self._folder, "released", self.lease_id, indices, len(indices))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
