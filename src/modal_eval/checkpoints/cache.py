"""Checkpoints on this node's disk, by content: `checkpoints/DIGEST/`, shared by all runs.

A kernel lock per checkpoint (`locks/DIGEST`) says who may do what with it, and is freed however its holder dies: whoever
fetches or removes it holds it alone, whoever uses it shares it. The lock's file time is when it was last used.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from modal_eval import paths
from modal_eval.errors import CheckpointError, ConfigError
from modal_eval.processes import boot_id
from modal_eval.records import PreparedModel

logger = logging.getLogger(__name__)

GB = 10**9
MAX_SIZE = "MODAL_EVAL_CACHE_MAX_GB"
MIN_FREE = "MODAL_EVAL_CACHE_MIN_FREE_GB"
MIN_FREE_SHARE = 0.05
POLL_S = 0.1
BOOT = ".modal-eval-boot"
"""In a checkpoint's folder: the boot of this machine in which its files were checked. A crash may have lost some since."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint's place in the cache."""

    digest: str

    @property
    def folder(self) -> Path:
        return _root() / self.digest

    @property
    def unfinished(self) -> Path:
        """Where it is fetched to, before it gets its name."""
        return _root() / "unfinished" / self.digest

    @property
    def lock(self) -> Path:
        return _root() / "locks" / self.digest

    def is_ready(self) -> bool:
        """Whether it is there and was checked since this machine started."""
        with suppress(OSError):
            return (self.folder / BOOT).read_text() == boot_id()
        return False

    def used_at(self) -> float:
        with suppress(OSError):
            return self.lock.stat().st_mtime
        return 0.0

    def size(self) -> int:
        """Bytes on disk; a file that is still being fetched counts by what is there of it."""
        return sum(_size_on_disk(folder) for folder in (self.folder, self.unfinished))

    def remove(self) -> None:
        """Remove its files. Only for the one who holds it alone."""
        for folder in (self.folder, self.unfinished):
            doomed = folder.with_name(f"{folder.name}.removed")
            with suppress(FileNotFoundError):
                folder.rename(doomed)  # at once: nobody finds half of it under its name
            shutil.rmtree(doomed, ignore_errors=True)


class Hold:
    """A checkpoint in use: it is not removed while this is open."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_prepared: dict[str, list[Hold]] = {}
"""Holds of checkpoints that were prepared in this process and are not yet loaded, by digest."""
_guard = threading.Lock()


def keep_until_used(entry: Entry, hold: Hold) -> None:
    """Leave the hold for the `use` that follows; at the latest the end of this process lets go."""
    with _guard:
        _prepared.setdefault(entry.digest, []).append(hold)


def use(model: PreparedModel) -> Hold | None:
    """Hold the model's files for as long as a server needs them; `None` for a model that is not in the cache.

    Raises `CheckpointError` when they have been removed since the run was prepared.
    """
    entry = _entry_of(model)
    if entry is None:
        return None
    with _guard:
        if held := _prepared.get(entry.digest):
            return held.pop()
    if hold := try_use(entry):
        return hold
    raise CheckpointError(f"{model.model_id} is no longer in {entry.folder}; `modal-eval resume` fetches it again")


def _entry_of(model: PreparedModel) -> Entry | None:
    if model.source != "s3" or model.revision is None:
        return None
    return Entry(model.revision.removeprefix("sha256:"))


def try_use(entry: Entry) -> Hold | None:
    """Share the checkpoint if it is there, waiting for one who is fetching it."""
    descriptor = _locked(entry, fcntl.LOCK_SH)
    if not entry.is_ready():
        os.close(descriptor)
        return None
    os.utime(entry.lock)
    return Hold(descriptor)


@contextmanager
def alone(entry: Entry) -> Iterator[None]:
    """Hold the checkpoint alone, after all others; what this process has prepared of it is let go."""
    with _guard:
        for hold in _prepared.pop(entry.digest, []):
            hold.close()  # of files that are gone, and waiting for ourselves would never end
    descriptor = _locked(entry, fcntl.LOCK_EX)
    try:
        os.utime(entry.lock)
        yield
    finally:
        os.close(descriptor)


def _locked(entry: Entry, how: int) -> int:
    entry.lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(entry.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    said = False
    try:
        while not _try_lock(descriptor, how):
            if not said:
                logger.info("another run has checkpoint %s; waiting for it", entry.digest[:12])
                said = True
            time.sleep(POLL_S)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _try_lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_room(entry: Entry, total: int) -> None:
    """Remove what was used least recently until `total` bytes of `entry` fit, less those of it that are there.

    `MODAL_EVAL_CACHE_MAX_GB` limits the cache (default: no limit), `MODAL_EVAL_CACHE_MIN_FREE_GB` is what stays free on
    the disk (default: 5% of it). What another run is still fetching counts as if it were there; what is in use stays.
    Raises `CheckpointError` with the numbers when there is not enough to remove.
    """
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    room = root / "locks" / "room"
    room.parent.mkdir(exist_ok=True)
    descriptor = os.open(room, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two at once would both see the same free bytes
        while lacking := _lacking(entry, total):
            if not _remove_oldest(entry):
                raise CheckpointError(
                    f"no room for {total / GB:.1f} GB of checkpoint in {root}: {lacking}, and the rest of the cache is in "
                    f"use; free some space, or set MODAL_EVAL_CACHE_DIR, {MIN_FREE} or {MAX_SIZE}"
                )
        entry.unfinished.mkdir(parents=True, exist_ok=True)
        (entry.unfinished / ".size").write_text(str(total))
    finally:
        os.close(descriptor)


def _lacking(entry: Entry, total: int) -> str | None:
    """Why `entry` does not fit, or `None`."""
    mine = max(total - entry.size(), 0)
    others = [other for other in _entries() if other != entry]
    coming = sum(max(_announced(other) - other.size(), 0) for other in others if _is_held(other))
    disk = shutil.disk_usage(_root())
    least = _gigabytes(MIN_FREE, MIN_FREE_SHARE * disk.total)
    if disk.free - mine - coming < least:
        return f"{disk.free / GB:.1f} GB are free and {least / GB:.1f} GB have to stay free"
    limit = _gigabytes(MAX_SIZE, float("inf"))
    cached = sum(other.size() for other in others) + entry.size() + mine + coming
    return f"the cache may have {limit / GB:.1f} GB" if cached > limit else None


def _announced(entry: Entry) -> int:
    with suppress(OSError, ValueError):
        return int((entry.unfinished / ".size").read_text())
    return 0


def _remove_oldest(keep: Entry) -> bool:
    """Remove the checkpoint that was used least recently and that nobody uses; returns whether there was one."""
    for entry in sorted(_entries(), key=Entry.used_at):
        if entry == keep:
            continue
        entry.lock.touch()
        descriptor = os.open(entry.lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX):
                logger.info("removing checkpoint %s from %s to make room", entry.digest[:12], _root())
                entry.remove()
                return True
        finally:
            os.close(descriptor)
    return False


def _is_held(entry: Entry) -> bool:
    try:
        descriptor = os.open(entry.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_EX)
    finally:
        os.close(descriptor)


def _entries() -> list[Entry]:
    found = {path.name for folder in (_root(), _root() / "unfinished") for path in _listed(folder)}
    return [Entry(name) for name in sorted(found) if len(name) == 64]


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in folder.iterdir() if path.is_dir()]
    return []


def _size_on_disk(folder: Path) -> int:
    total = 0
    with suppress(OSError):
        for path in folder.iterdir():
            with suppress(OSError):
                total += path.stat().st_blocks * 512
    return total


def _gigabytes(name: str, default: float) -> float:
    given = os.environ.get(name)
    if not given:
        return default
    try:
        return float(given) * GB
    except ValueError:
        raise ConfigError(f"{name}={given} is no number; give gigabytes, such as 200") from None


def _root() -> Path:
    return paths.cache_dir() / "checkpoints"


def finish(entry: Entry) -> None:
    """Give a whole and checked checkpoint its name. Only for the one who holds it alone."""
    (entry.unfinished / ".size").unlink(missing_ok=True)
    (entry.unfinished / BOOT).write_text(boot_id())
    entry.unfinished.rename(entry.folder)


def reopen(entry: Entry) -> bool:
    """Make a checkpoint of an earlier boot unfinished again; returns whether its files have to be checked anew."""
    if entry.folder.is_dir():
        shutil.rmtree(entry.unfinished, ignore_errors=True)
        entry.unfinished.parent.mkdir(parents=True, exist_ok=True)
        entry.folder.rename(entry.unfinished)
    entry.unfinished.mkdir(parents=True, exist_ok=True)
    mark = entry.unfinished / BOOT
    if not mark.is_file():
        mark.write_text(boot_id())
    return mark.read_text() != boot_id()
