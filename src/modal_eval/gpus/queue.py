"""Those who wait, in the order in which they came: one locked file each, so that a dead waiter is out of the queue."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from modal_eval.errors import GpuError
from modal_eval.gpus import history
from modal_eval.gpus.folder import Folder, is_locked, lock_now, read_text, write_text
from modal_eval.gpus.records import Holder
from modal_eval.gpus.rule import Request

SILENT_S = 30.0
"""A waiter that has not asked for so long (stopped with ^Z, a suspended container) is passed over until it asks again."""


@dataclass(frozen=True)
class Waiter:
    """A request, and who made it."""

    request: Request
    holder: Holder


class Ticket:
    """This process's place in the queue. Enter, ask and leave under the folder's lock."""

    def __init__(self, folder: Folder, holder: Holder, count: int, allowed: Collection[str]) -> None:
        self.number = last_number(folder) + 1
        self.since = time.monotonic()
        self._count = count
        self._allowed = sorted(allowed)
        self._holder = holder
        self._path = folder.queue / f"{self.number:012d}.ticket"
        self._file = lock_now(self._path)
        if self._file is None:
            raise GpuError(f"{self._path} is held by a process that took no place in the queue; remove the file")
        self.ask()

    def ask(self) -> None:
        """Say that this process still waits."""
        if self._file is not None:
            times = {"since": self.since, "asked": time.monotonic()}
            wish = {"count": self._count, "allowed": self._allowed}
            write_text(self._file, {**wish, **times, "holder": asdict(self._holder)})

    def leave(self) -> bool:
        """Give the place up; whether there still was one. May be called without the folder's lock when the wait was cut off."""
        if self._file is None:
            return False
        self._path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = None
        return True


def last_number(folder: Folder) -> int:
    return max((int(path.stem) for path in folder.queue.glob("*.ticket")), default=0)


def waiters(folder: Folder) -> list[Waiter]:
    """Everybody who waits, the first comer first; tickets of the dead are removed where this user may."""
    found = []
    for path in sorted(folder.queue.glob("*.ticket")):
        if not is_locked(path):
            with contextlib.suppress(OSError):  # another user's
                gone = Holder.read((read_text(path) or {}).get("holder") or {})
                path.unlink()
                if gone:
                    history.note(folder, "left", gone.lease_id, (), 0)
        elif (waiter := read_waiter(path)) is not None:
            found.append(waiter)
    return found


def read_waiter(path: Path) -> Waiter | None:
    """The ticket in `path`; `None` for one that is not whole or whose owner has fallen silent."""
    text = read_text(path) or {}
    holder = Holder.read(text.get("holder") or {})
    now = time.monotonic()  # one clock for all processes of a machine
    if holder is None or now - float(text.get("asked", 0)) > SILENT_S:
        return None
    return Waiter(Request(int(path.stem), text["count"], frozenset(text["allowed"]), now - text["since"]), holder)
