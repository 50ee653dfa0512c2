"""All of a machine's GPUs at one moment: use, holders, waiters, leftovers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from modal_eval.gpus.folder import Folder, is_locked
from modal_eval.gpus.inventory import inventory, visible
from modal_eval.gpus.queue import Waiter, waiters
from modal_eval.gpus.records import Gpu, Holder
from modal_eval.gpus.zombies import IDLE_S, end_ours, end_processes, orphans


@dataclass(frozen=True)
class Survey:
    """What `survey` saw."""

    gpus: list[Gpu]
    visible: list[Gpu]
    """Those that `CUDA_VISIBLE_DEVICES` leaves to this process."""
    holders: Mapping[str, Holder | None]
    """Of each leased GPU, by UUID; `None` where the file does not say who."""
    waiting: list[Waiter]
    zombies: frozenset[int]
    """Pids of other programs' leftovers of this user, which only `reap` ends."""
    ended: frozenset[int]
    """Pids of processes that were ended: leftovers of ours, and with `reap` those of other programs."""

    def state(self, gpu: Gpu) -> str:
        """`leased`, `zombie`, `used`, `mig`, or `free`."""
        if gpu.uuid in self.holders:
            return "leased"
        if gpu.mig:
            return "mig"
        if gpu.processes and all(one.pid in self.zombies for one in gpu.processes):
            return "zombie"
        return "free" if gpu.quiet else "used"


def survey(*, reap: bool = False, idle_s: float = IDLE_S, folder: Folder | None = None) -> Survey:
    """Look at every GPU, end what dead runs of ours left, and find what other programs left.

    With `reap` the latter are ended too. If there is a process to be watched, that takes `idle_s` seconds. Raises
    `GpuError` as `inventory` does.
    """
    folder = folder or Folder()
    gpus = inventory()
    if not gpus:
        return Survey([], [], {}, [], frozenset(), frozenset())
    ended = end_ours(folder)
    with folder.locked():
        leased = {gpu.uuid for gpu in gpus if is_locked(folder.lease_path(gpu.uuid))}
        holders = {uuid: folder.holder(uuid) for uuid in leased}
        waiting = waiters(folder)
    zombies = orphans([gpu for gpu in gpus if gpu.uuid not in leased], idle_s)
    if reap:
        end_processes(zombies)
        ended += zombies
    if ended:
        gpus = inventory()
    left = frozenset() if reap else frozenset(zombies)
    return Survey(gpus, visible(gpus), holders, waiting, left, frozenset(ended))
