"""Every server that this user has, here and on Modal: one entry each, with all who hold it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from modal_eval.records import Lease
from modal_eval.serving.leases import family_of, is_live, leases
from modal_eval.serving.modal_servers import Orphan
from modal_eval.serving.prices import Price


def here(lease: Lease) -> bool:
    return lease.host == socket.gethostname()


@dataclass(frozen=True)
class Server:
    """One server and its leases; or an app on Modal that has none here."""

    leases: tuple[Lease, ...]
    """Of those who hold it, in the order in which they came; of all its replicas where it ends with its run."""
    processes: tuple[Lease, ...] = ()
    """Of the replicas that a keeper has."""
    orphan: Orphan | None = None

    @property
    def _first(self) -> Lease:
        return (*self.leases, *self.processes)[0]

    @property
    def app(self) -> str:
        """The name by which it is shared; empty for a server that ends with its run."""
        return self.orphan.app if self.orphan else self._first.app

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes on this machine or another host; none on Modal."""
        shown = self.processes or self.leases
        return () if self.on_modal else tuple(one.server_pid for one in shown if one.server_pid)

    @property
    def name(self) -> str:
        return self.app or f"pid {', '.join(map(str, self.pids)) or 'not started yet'}"

    @property
    def on_modal(self) -> bool:
        return self.orphan is not None or self._first.kind == "modal"

    @property
    def here(self) -> bool:
        return not self.on_modal and here(self._first)

    @property
    def where(self) -> str:
        return "Modal" if self.on_modal else self._first.host

    @property
    def model(self) -> str:
        return self.orphan.model if self.orphan else self._first.model

    @property
    def url(self) -> str:
        return next((one.url for one in (*self.processes, *self.leases) if one.url), "")

    @property
    def run_dirs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.run_dir for one in self.leases if one.run_dir))

    @property
    def created_at(self) -> str:
        """Since when it is there; ISO 8601. Empty where nobody knows."""
        if self.orphan:
            return self.orphan.created_at
        return min(one.since or one.created_at for one in (*self.leases, *self.processes))

    @property
    def age_s(self) -> float:
        """Seconds since then."""
        if not self.created_at:
            return 0.0
        return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(self.created_at)).total_seconds())

    @property
    def deadline(self) -> float | None:
        """Unix time after which anybody may stop it; `None` where that is the end of a run."""
        if self.orphan:
            return self.orphan.deadline
        given = [one.deadline for one in self.leases]
        return max((one for one in given if one), default=None) if all(given) else None

    @property
    def live(self) -> bool:
        """Whether anybody has a right to it."""
        if self.orphan:
            return not self.orphan.may_stop
        return any(is_live(one) for one in self.leases or self.processes)

    @property
    def why_not_live(self) -> str:
        """In a few words; for one that is not live."""
        if self.deadline is not None and self.deadline < time.time():
            return "its deadline has passed"
        if self.orphan:
            return "no lease of it is left"
        if self._first.kind == "keeper" and self._first.kept:
            return "its keeper is dead"
        return "its holder is dead"

    @property
    def price(self) -> Price:
        """Of all its GPUs."""
        if self.orphan:
            return self.orphan.price
        counted = self.processes or (self.leases[:1] if self.app else self.leases)
        prices = [one.hour_price for one in counted]
        total = sum(price for price in prices if price is not None) if None not in prices else None
        first = counted[0]
        return Price(sum(one.gpus for one in counted), first.gpu, total, first.price_is_estimate)

    @property
    def cost(self) -> float | None:
        """Dollars so far, at most: Modal charges nothing while its GPU is given back."""
        return None if self.price.an_hour is None else self.price.an_hour * self.age_s / 3600

    @property
    def gpu_hours(self) -> float:
        return self.price.gpus * self.age_s / 3600


@dataclass(frozen=True, slots=True)
class HeldGpus:
    """GPUs that a run holds, all of its server's."""

    gpus: int
    since: str
    """When it got them; ISO 8601, UTC."""


def held_gpus(run_dir: Path) -> HeldGpus | None:
    """The GPUs that this process holds for the run in `run_dir`, as far as leases say; `None` where they say nothing.

    A keeper has them since before the run came to share its server, or gets them after it was asked for one.
    """
    for server in servers():
        mine = [
            one
            for one in server.leases
            if (one.run_dir, one.holder_pid, one.kept) == (str(run_dir), os.getpid(), False)
        ]
        if mine and server.price.gpus:
            taken = [one.created_at for one in server.processes or mine]
            return HeldGpus(server.price.gpus, max(min(one.created_at for one in mine), min(taken)))
    return None


def servers(orphans: Sequence[Orphan] = ()) -> list[Server]:
    """Every server that a lease of this state speaks of, and `orphans`; oldest first."""
    groups: dict[str, list[Lease]] = {}
    for lease in leases():
        groups.setdefault(lease.app or family_of(lease), []).append(lease)
    found = []
    for group in groups.values():
        processes = tuple(one for one in group if one.app and one.kind == "process")
        holders = tuple(one for one in group if one not in processes)
        found.append(Server(holders, processes))
    return [*found, *(Server((), (), one) for one in orphans)]
