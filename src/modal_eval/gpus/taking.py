"""Waiting for GPUs and taking them: who may have which is `rule`'s to say, this does it."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from modal_eval.errors import GpuError
from modal_eval.gpus import history
from modal_eval.gpus.folder import Folder, lock_now
from modal_eval.gpus.inventory import inventory, visible
from modal_eval.gpus.lease import GpuLease, HeldGpu
from modal_eval.gpus.queue import Ticket, waiters
from modal_eval.gpus.records import Gpu, Holder
from modal_eval.gpus.rule import PATIENCE_S, assign
from modal_eval.gpus.zombies import end_ours

POLL_S = 0.5


@dataclass(frozen=True)
class Wish:
    """What one call asks for."""

    count: int
    up_to: int
    holder: Holder
    gpus: Sequence[Gpu]
    """Those that it may use at all, in order."""
    there: Sequence[Gpu]
    """All of the machine, for others may wait for others."""

    @property
    def uuids(self) -> frozenset[str]:
        return frozenset(gpu.uuid for gpu in self.gpus)

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(gpu.index for gpu in self.gpus)


@dataclass
class View:
    """The GPUs at one moment, seen under the folder's lock. `locks` are ours for as long as we look."""

    locks: dict[str, int] = field(default_factory=dict)
    leased: list[str] = field(default_factory=list)
    now: dict[str, Gpu] = field(default_factory=dict)
    """Fresh from the driver; empty where the leases alone say that there is nothing to be had."""


def take(
    count: int = 1,
    *,
    run: str,
    what: str = "",
    up_to: int | None = None,
    timeout: float | None = None,
    on_wait: Callable[[str], None] | None = None,
    folder: Folder | None = None,
) -> GpuLease:
    """Wait until `count` GPUs are free for this request and take all of them at once, or raise.

    `run` and `what` are what others are told of the holder. With `up_to`, further multiples of `count` are taken where
    they are free and nobody waits. `timeout` is in seconds, `None` waits for ever, and 0 takes at once or not at all.
    `on_wait` is told who holds what, each time that changes. `CUDA_VISIBLE_DEVICES` limits what may be taken. Raises
    `GpuError` when the machine has too few GPUs for this process, when the time is over, or when the driver is silent.
    """
    folder = folder or Folder()
    wish = new_wish(count, up_to, run, what)
    end_ours(folder)
    deadline = None if timeout is None else time.monotonic() + timeout
    said = ""
    with queued(folder, wish) as ticket:
        while True:
            with folder.locked():
                lease, news = attempt(folder, wish, ticket)
            if lease is not None:
                return lease
            if deadline is not None and time.monotonic() >= deadline:
                raise GpuError(f"no GPU after {timeout:g} s: {news}; `modal-eval gpus` shows who uses what")
            if news != said and on_wait is not None:
                on_wait(news)
            said = news
            time.sleep(POLL_S)
            if "is gone" in news:  # a dead run's server may be what holds a GPU
                end_ours(folder)


def try_take(
    count: int = 1, *, run: str, what: str = "", up_to: int | None = None, folder: Folder | None = None
) -> GpuLease | None:
    """The same as `take` without waiting: `None` when the GPUs cannot be had at once, those who wait coming first."""
    folder = folder or Folder()
    wish = new_wish(count, up_to, run, what)
    end_ours(folder)
    with queued(folder, wish) as ticket, folder.locked():
        return attempt(folder, wish, ticket)[0]


def new_wish(count: int, up_to: int | None, run: str, what: str) -> Wish:
    """What to ask for. Raises `GpuError` when no wait could ever bring that many."""
    if count < 1:
        raise ValueError(f"count={count}: a lease has at least one GPU")
    there, mine = usable(count)
    return Wish(count, max(count, up_to or count), Holder.me(secrets.token_hex(6), run, what), mine, there)


def usable(count: int) -> tuple[Sequence[Gpu], Sequence[Gpu]]:
    """The machine's GPUs, and those of them that this process may ever have. Raises `GpuError` when they are fewer than
    `count`."""
    there = inventory()
    if not there:
        raise GpuError(
            "this machine has no NVIDIA GPU; use infra.target=modal, an endpoint, or a GGUF model with llama.cpp"
        )
    mine = [gpu for gpu in visible(there) if not gpu.mig]
    if len(mine) < count:
        limited = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = f" with CUDA_VISIBLE_DEVICES={limited}" if limited is not None else ""
        in_parts = f", {sum(gpu.mig for gpu in there)} cut up by MIG" if any(gpu.mig for gpu in there) else ""
        raise GpuError(
            f"{count} GPUs are wanted, and this process may use {len(mine)} of the machine's {len(there)}{because}"
            f"{in_parts}; ask for fewer, or change what limits them"
        )
    return there, mine


@contextlib.contextmanager
def queued(folder: Folder, wish: Wish) -> Iterator[Ticket]:
    with folder.locked():
        ticket = Ticket(folder, wish.holder, wish.count, wish.uuids)
        history.note(folder, "asked", wish.holder.lease_id, wish.indices, wish.count, wish.holder.run)
    try:
        yield ticket
    finally:
        if ticket.leave():
            history.note(folder, "left", wish.holder.lease_id, (), wish.count)


def attempt(folder: Folder, wish: Wish, ticket: Ticket) -> tuple[GpuLease | None, str]:
    """Take the GPUs if it is this request's turn, under the folder's lock; else say what it waits for."""
    ticket.ask()
    view = look(wish, folder)
    kept: set[str] = set()
    try:
        waiting = [waiter.request for waiter in waiters(folder)]
        free = [uuid for uuid in view.locks if uuid in view.now and view.now[uuid].quiet]
        given = assign(waiting, free, view.leased, PATIENCE_S)
        mine = list(given.get(ticket.number, ()))
        if not mine:
            place = [request.number for request in waiting].index(ticket.number) + 1
            return None, tell(folder, wish, view, place, len(waiting))
        if len(given) == len(waiting):
            spare = [uuid for uuid in free if uuid in wish.uuids and not any(uuid in one for one in given.values())]
            mine += spare[: min(wish.up_to - wish.count, len(spare)) // wish.count * wish.count]
        kept.update(mine)
        ticket.leave()
        held = [HeldGpu(view.now[uuid], view.locks[uuid]) for uuid in mine]
        lease = GpuLease(folder, wish.holder, sorted(held, key=lambda one: one.gpu.index))
        history.note(folder, "taken", lease.lease_id, lease.indices, wish.count, wish.holder.run)
        return lease, ""
    finally:
        for uuid, lock in view.locks.items():
            if uuid not in kept:
                os.close(lock)


def look(wish: Wish, folder: Folder) -> View:
    """Try every lock; ask the driver, which may take a second, only if the leases leave enough to be had."""
    view = View()
    for gpu in wish.there:
        if (lock := lock_now(folder.lease_path(gpu.uuid))) is None:
            view.leased.append(gpu.uuid)
        else:
            view.locks[gpu.uuid] = lock
    if len(wish.uuids & view.locks.keys()) >= wish.count:
        view.now = {gpu.uuid: gpu for gpu in inventory()}
    return view


def tell(folder: Folder, wish: Wish, view: View, place: int, length: int) -> str:
    """Who holds what of the GPUs that `wish` could use, in one line."""
    parts = []
    for gpu in wish.gpus:
        if gpu.uuid in view.leased:
            parts.append(f"GPU {gpu.index}: {folder.holder(gpu.uuid) or 'being taken'}")
        elif not (now := view.now.get(gpu.uuid, gpu)).quiet:
            parts.append(f"GPU {gpu.index}: {strangers(now)}")
        else:
            parts.append(f"GPU {gpu.index}: free{', kept for an older request' if place > 1 else ''}")
    wanted = "a GPU" if wish.count == 1 else f"{wish.count} GPUs"
    return f"waiting for {wanted}, place {place} of {length} in the queue; {'; '.join(parts)}"


def strangers(gpu: Gpu) -> str:
    """Who uses a GPU without a lease."""
    if not gpu.processes:
        return f"{gpu.used_mib} MiB used by a process that cannot be seen from here"
    return ", ".join(f"used by {one.user or 'unknown'} (pid {one.pid}, {one.name[:60]})" for one in gpu.processes)
