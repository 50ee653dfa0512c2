"""The folder in which the users of a machine agree on its GPUs: one lease file a GPU, and the queue.

A file is taken by the kernel's lock on it (`flock`), which goes when the last process that holds the file open has
ended, however it ended. A file's text only says who that is. Locks are tried under one lock of the whole folder, so
that looking at a lock for a moment is never taken for holding it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modal_eval import paths
from modal_eval.errors import GpuError
from modal_eval.gpus.records import Holder

LOCK_TIMEOUT_S = 60.0
"""The folder's lock is held while the driver is asked, for seconds at most."""
POLL_S = 0.01
NODE_LOCK = "node.lock"
TEXT_LIMIT = 65_536


class Folder:
    """`paths.gpu_leases_dir()`, made when it is first needed."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or paths.gpu_leases_dir()
        self.queue = self.path / "queue"

    def lease_path(self, uuid: str) -> Path:
        return self.path / f"{re.sub(r'[^A-Za-z0-9-]', '_', uuid)}.lease"

    def make(self) -> None:
        """Make the folder for all users: everybody may add files, only their owner may remove them.

        Raises `GpuError` when it is a link or cannot be written.
        """
        for path in (self.path, self.queue):
            try:
                path.mkdir(parents=path == self.path)
                path.chmod(0o1777)
            except FileExistsError:
                pass
            except OSError as error:
                raise GpuError(
                    f"{path} cannot be made: {error.strerror}; set MODAL_EVAL_GPU_DIR to a folder"
                ) from error
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or not os.access(path, os.W_OK):
                raise GpuError(
                    f"{path} is no folder that this user may write to; remove it, or set MODAL_EVAL_GPU_DIR to another "
                    "one for everybody who uses these GPUs"
                )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock. Raises `GpuError` when somebody else keeps it for `LOCK_TIMEOUT_S`."""
        self.make()
        path = self.path / NODE_LOCK
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while (file := lock_now(path)) is None:
            if time.monotonic() > deadline:
                owner = (read_text(path) or {}).get("pid", "unknown")
                raise GpuError(f"pid {owner} has kept {path} locked for {LOCK_TIMEOUT_S:g} s; end it if it hangs")
            time.sleep(POLL_S)
        try:
            write_text(file, {"pid": os.getpid()})
            yield
        finally:
            os.close(file)

    def holder(self, uuid: str) -> Holder | None:
        """Who the lease file of a GPU names, which means nothing once its lock is free."""
        return Holder.read(read_text(self.lease_path(uuid)) or {})

    def holders(self) -> list[Holder]:
        """Whom the lease files name, current or not."""
        texts = (read_text(path) for path in sorted(self.path.glob("*.lease")))
        return [holder for text in texts if text and (holder := Holder.read(text))]


def lock_now(path: Path) -> int | None:
    """Open and lock a file that is to be shared by all users; `None` while somebody else holds it.

    The caller owns the descriptor: closing it, in every process that has inherited it, frees the lock.
    """
    file = open_shared(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_ino == path.stat().st_ino:
            return file
    except (BlockingIOError, FileNotFoundError):  # held, or removed and made anew by somebody else
        pass
    os.close(file)
    return None


def open_shared(path: Path) -> int:
    """Open for reading and writing, made for all users where it is missing.

    Not with O_CREAT alone: in a folder of everybody's the kernel refuses that for files of others
    (`fs.protected_regular`).
    """
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    os.fchmod(file, 0o666)  # whatever the umask
    return file


def is_locked(path: Path) -> bool:
    """Whether somebody holds the file; to be asked under the folder's lock."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def write_text(file: int, value: dict[str, Any]) -> None:
    """Replace the text in place: another file under the same name would be another lock."""
    text = json.dumps(value).encode()
    os.pwrite(file, text, 0)
    os.ftruncate(file, len(text))


def read_text(path: Path) -> dict[str, Any] | None:
    """The text of a file; `None` when it is gone or was cut off in the middle."""
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(TEXT_LIMIT))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
