"""What became of a node's GPUs: a line for each request, lease and return, and what can be read from them.

The lines are for people and for sums. Who holds a GPU now is said by the locks alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from modal_eval.gpus.folder import Folder, open_shared
from modal_eval.gpus.rule import Request, assign

LOG = "history.jsonl"
LIMIT = 4 << 20
"""Bytes; beyond them the older half is forgotten."""

What = Literal["asked", "taken", "left", "released"]


@dataclass(frozen=True)
class Event:
    """One line. A holder that was killed has no `released`: its GPUs are back when somebody else has `taken` them."""

    at: float
    """Unix time in seconds."""
    what: What
    lease_id: str
    gpus: tuple[int, ...]
    """`asked`: those that would do. Else: those that it is about."""
    count: int
    run: str = ""


def note(folder: Folder, what: What, lease_id: str, gpus: Iterable[int], count: int, run: str = "") -> None:
    """Add a line. A full disk costs the line and nothing else."""
    event = Event(time.time(), what, lease_id, tuple(gpus), count, run)
    line = json.dumps(asdict(event), separators=(",", ":")).encode() + b"\n"
    try:
        file = open_shared(folder.path / LOG)
    except OSError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if (size := os.fstat(file).st_size) + len(line) > LIMIT:
            newer = os.pread(file, LIMIT // 2, size - LIMIT // 2).partition(b"\n")[2]
            os.pwrite(file, newer, 0)
            os.ftruncate(file, size := len(newer))
        os.pwrite(file, line, size)
    except OSError:
        pass
    finally:
        os.close(file)


def read(folder: Folder) -> list[Event]:
    """All lines that are whole, the oldest first."""
    try:
        lines = (folder.path / LOG).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            told = json.loads(line)
            found.append(Event(**{**told, "gpus": tuple(told["gpus"])}))
        except (ValueError, TypeError, KeyError):  # cut off in the middle by a full disk
            continue
    return sorted(found, key=lambda event: event.at)


@dataclass(frozen=True)
class Lease:
    """What the lines say of one lease."""

    lease_id: str
    run: str
    gpus: tuple[int, ...]
    since: float
    waited_s: float
    until: float | None
    """`None` while nothing says that it has ended."""


def leases(events: Sequence[Event]) -> list[Lease]:
    """Every lease of the lines, in the order in which they began; one that lost its GPUs piece by piece ends with the last."""
    asked: dict[str, float] = {}
    begun: dict[str, Event] = {}
    held: dict[int, str] = {}
    left: dict[str, set[int]] = {}
    until: dict[str, float] = {}
    for event in events:
        if event.what == "asked":
            asked[event.lease_id] = event.at
        elif event.what == "taken":
            for gpu in event.gpus:
                if before := held.get(gpu):
                    left[before].discard(gpu)
                    until[before] = event.at
                held[gpu] = event.lease_id
            begun[event.lease_id], left[event.lease_id] = event, set(event.gpus)
        elif event.what == "released" and event.lease_id in left:
            left[event.lease_id] -= set(event.gpus)
            until[event.lease_id] = event.at
            held = {gpu: lease for gpu, lease in held.items() if lease != event.lease_id or gpu in left[lease]}
    return [
        Lease(
            lease_id, event.run, event.gpus, event.at, event.at - asked.get(lease_id, event.at),
            None if left[lease_id] else until[lease_id],
        )
        for lease_id, event in begun.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class Usage:
    """GPU-seconds of the time that the lines cover."""

    all_s: float
    leased_s: float
    wanted_idle_s: float
    """Free GPUs that the rule would have handed to somebody who waited just then."""


def usage(events: Sequence[Event], gpus: Sequence[int], until: float | None = None) -> Usage:
    """Sums over `gpus` from the first line to the last, or to `until` (Unix time).

    What strangers used without a lease counts as free.
    """
    all_s = leased_s = wanted_idle_s = 0.0
    waiting: dict[str, Event] = {}
    held: dict[int, str] = {}
    for number, event in enumerate(events):
        if event.what == "asked":
            waiting[event.lease_id] = event
        elif event.what in ("taken", "left"):
            waiting.pop(event.lease_id, None)
        for gpu in event.gpus if event.what in ("taken", "released") else ():
            if event.what == "taken":
                held[gpu] = event.lease_id
            elif held.get(gpu) == event.lease_id:
                del held[gpu]
        end = events[number + 1].at if number + 1 < len(events) else max(until or event.at, event.at)
        seconds = end - event.at
        all_s += seconds * len(gpus)
        leased_s += seconds * len(set(held) & set(gpus))
        wanted_idle_s += seconds * due(waiting.values(), [gpu for gpu in gpus if gpu not in held], held, event.at)
    return Usage(all_s, leased_s, wanted_idle_s)


def due(waiting: Iterable[Event], free: Sequence[int], held: Iterable[int], now: float) -> int:
    """How many of the `free` GPUs the rule gives to those who wait."""
    requests = [
        Request(number, event.count, frozenset(map(str, event.gpus)), now - event.at)
        for number, event in enumerate(waiting)
    ]
    return sum(map(len, assign(requests, [str(gpu) for gpu in free], [str(gpu) for gpu in held]).values()))
