"""`checkpoint.jsonl`: every finished call of a run, on disk before anybody sees the answer.

Memory holds a name and an offset per call, never an answer, however long the journal grows. One process writes it; a
replay without a server only reads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from modal_eval.config.identity import differences
from modal_eval.errors import IdentityError, JournalError, RunLockedError
from modal_eval.proxy import lines
from modal_eval.proxy.keys import CallKey
from modal_eval.proxy.lines import Answer

logger = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 1 << 20
MAX_HEADER = 16 * CHUNK
BEGINNING = b'{"modal_eval_journal"'


class Journal:
    """Finds finished calls again and writes new ones.

    `find` and `find_pending` belong to one thread and `commit` to another one: an entry is in the index only when it is
    on disk.
    """

    def __init__(
        self, path: Path, identity: dict[str, Any], *, reserve_bytes: int = 0, read_only: bool = False
    ) -> None:
        """Open or begin the journal at `path`.

        Raises `RunLockedError` when another process writes it, `IdentityError` when it belongs to another identity, and
        `JournalError` when it is no journal or cannot be written. A torn last line is cut off: its call is owed again.
        """
        self.path = path
        self.error: str | None = None
        """Why no further call should be begun; what is in flight may still find room."""
        self.damaged = 0
        """Lines that were found broken; their calls are owed again."""
        self._answers: dict[bytes, int] = {}
        self._pending: dict[bytes, int] = {}
        self._lock = path.with_suffix(".lock")
        self._reserve = path.with_suffix(".reserve")
        self._broken = False
        self._read_only = read_only
        try:
            self._file = os.open(path, os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT), 0o644)
        except OSError as error:
            raise JournalError(f"the journal {path} cannot be opened: {error.strerror}") from error
        try:
            if not read_only:
                self._take_lock()
            self._end = self._load(identity)
            if reserve_bytes and not read_only:
                self._hold_reserve(reserve_bytes)
        except OSError as error:
            os.close(self._file)
            raise JournalError(f"the journal {path} cannot be opened: {error.strerror or error}") from error
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        """Finished calls."""
        return len(self._answers)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(
                f"the journal {self.path} is being written by {holder(self._lock)}; wait for that run's end, or end it "
                "with `modal-eval stop`"
            ) from None
        self._lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))

    def _load(self, identity: dict[str, Any]) -> int:
        """Index every whole line; returns where the next one goes."""
        header = read_header(self.path, self._file)
        if header is None:
            if self._read_only:
                return 0
            os.ftruncate(self._file, 0)
            first = lines.encode_header(identity, datetime.now(UTC).isoformat(timespec="seconds"))
            self._end = 0
            self._append(first)
            os.fsync(self._file)
            sync_folder(self.path.parent)
            return len(first)
        refuse_other_identity(self.path, header.identity, identity)
        end = self._index_from(header.length)
        if end < os.fstat(self._file).st_size and not self._read_only:
            os.ftruncate(self._file, end)
        if self.damaged:
            logger.warning("%s has %d damaged lines; their calls are owed again", self.path, self.damaged)
        return end

    def _index_from(self, position: int) -> int:
        """Leap from line to line; returns the end of the last whole one."""
        size = os.fstat(self._file).st_size
        while position < size:
            head = lines.read_head(os.pread(self._file, lines.MAX_HEAD, position))
            end = position + head.length if head else 0
            if head and end <= size and os.pread(self._file, 1, end - 1) == b"\n":
                self._enter(head.kind, head.name, position)
                position = end
                continue
            newline = self._find_newline(position, size)
            if newline is None:  # the last line, torn
                break
            self.damaged += 1
            position = newline + 1
        return position

    def _enter(self, kind: lines.Kind, name: bytes, position: int) -> None:
        if kind == "answer":
            self._answers[name] = position
            self._pending.pop(name, None)
        else:
            self._pending[name] = position

    def _find_newline(self, position: int, size: int) -> int | None:
        while position < size:
            chunk = os.pread(self._file, CHUNK, position)
            if (at := chunk.find(b"\n")) >= 0:
                return position + at
            position += len(chunk)
        return None

    def find(self, key: CallKey) -> Answer | None:
        """The finished answer; `None` when the call is owed."""
        line = self._line(self._answers, key)
        answer = lines.decode_answer(line) if line else None
        if line and answer is None:
            self._forget(self._answers, key)
        return answer

    def find_pending(self, key: CallKey) -> str | None:
        """Result URL of a call that the server already works on."""
        line = self._line(self._pending, key)
        url = lines.decode_pending(line) if line else None
        if line and url is None:
            self._forget(self._pending, key)
        return url

    def _line(self, index: dict[bytes, int], key: CallKey) -> bytes | None:
        offset = index.get(key.name)
        if offset is None:
            return None
        start = os.pread(self._file, 16_384, offset)
        head = lines.read_head(start)
        if head is None:
            return start
        if head.length > len(start):
            start += os.pread(self._file, head.length - len(start), offset + len(start))
        return start[: head.length]

    def _forget(self, index: dict[bytes, int], key: CallKey) -> None:
        self.damaged += 1
        offset = index.pop(key.name)
        logger.warning(
            "%s is damaged at byte %d (rollout %r, request %s); the call is owed again",
            self.path, offset, key.tag, key.digest[:12],
        )  # fmt: skip

    def commit(self, entries: Sequence[tuple[CallKey, bytes]]) -> list[JournalError | None]:
        """Write lines and return once they are on disk, one flush for all; for each, why it could not be written.

        On a full disk the reserve is given up so that finished answers find room, and `error` is set.
        """
        start = self._end
        offsets: list[int] = []
        if not self._broken:
            try:
                self._append(b"".join(line for _, line in entries))
                os.fdatasync(self._file)
                offsets = [start + sum(len(line) for _, line in entries[:i]) for i in range(len(entries))]
            except OSError as error:
                offsets = self._rescue(start, entries, error)
        offsets = offsets or [-1] * len(entries)
        for (key, line), offset in zip(entries, offsets, strict=True):
            if offset >= 0 and (head := lines.read_head(line)):
                self._enter(head.kind, key.name, offset)
        failure = JournalError(f"{self.path} cannot be written: {self.error}")
        return [None if offset >= 0 else failure for offset in offsets]

    def _rescue(self, start: int, entries: Sequence[tuple[CallKey, bytes]], error: OSError) -> list[int]:
        """Make room and write what fits, line by line; returns offsets, -1 for what did not fit."""
        self.error = error.strerror or str(error)
        logger.error("%s cannot be written: %s", self.path, self.error)
        self._cut(start)
        if error.errno not in DISK_FULL:
            self._broken = True  # after a failed flush nobody knows what is on disk: write nothing behind it
            return []
        self._reserve.unlink(missing_ok=True)
        offsets = []
        for _, line in entries:
            before = self._end
            try:
                self._append(line)
                offsets.append(before)
            except OSError:
                self._cut(before)
                offsets.append(-1)
        try:
            os.fdatasync(self._file)
        except OSError:
            self._cut(start)
            return []
        return offsets

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        position = self._end
        while view:
            written = os.pwrite(self._file, view, position)
            view = view[written:]
            position += written
        self._end = position

    def _cut(self, end: int) -> None:
        """Take back what was written of lines that did not get whole."""
        self._end = end
        with contextlib.suppress(OSError):  # what stays is a torn line, which the next open cuts off
            os.ftruncate(self._file, end)

    def _hold_reserve(self, size: int) -> None:
        descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            self._reserve.unlink()
            if error.errno not in DISK_FULL:
                raise
            raise JournalError(
                f"{size / 2**20:.0f} MiB cannot be held back beside {self.path} ({error.strerror}): the disk would fill up "
                "in the middle of the run; free some space, then `modal-eval resume`"
            ) from error
        finally:
            os.close(descriptor)

    def close(self) -> None:
        if self._file < 0:
            return
        if not self._read_only:
            self._reserve.unlink(missing_ok=True)
            self._lock.unlink(missing_ok=True)  # before the journal's own lock ends, so it cannot be another's
        os.close(self._file)
        self._file = -1


class Header:
    """Whom a journal belongs to."""

    def __init__(self, identity: dict[str, Any], length: int) -> None:
        self.identity = identity
        self.length = length
        """Where the first call stands."""


def read_header(path: Path, descriptor: int) -> Header | None:
    """The first line; `None` when the journal was never begun, or torn before its first line was whole."""
    data = b""
    while b"\n" not in data and len(data) < MAX_HEADER and (chunk := os.pread(descriptor, CHUNK, len(data))):
        data += chunk
    line, newline, _ = data.partition(b"\n")
    if not newline and (not line.strip(b"\0") or line[: len(BEGINNING)] == BEGINNING[: len(line)]):
        return None
    try:
        found = orjson.loads(line)
        version, identity = found["modal_eval_journal"], found["identity"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise JournalError(
            f"{path} is no journal of modal-eval: it begins with {line[:60]!r}; move it away, or start a new run"
        ) from None
    if version != lines.VERSION:
        raise JournalError(
            f"{path} has format {version}, and this modal-eval reads format {lines.VERSION}; resume the run with the version "
            "that began it, or start a new run"
        )
    return Header(identity, len(line) + 1)


def refuse_other_identity(path: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = [
        f"  {key}: {json.dumps(before)} in the journal, {json.dumps(now)} now"
        for key, before, now in differences(held, json.loads(json.dumps(wanted)))
    ]
    if found:
        raise IdentityError(
            f"{path} belongs to another configuration, and its answers cannot be used for this one:\n"
            + "\n".join(found)
            + "\nGo back to the old settings, or start a new run with `modal-eval run`."
        )


def check_identity(journal: Path, identity: dict[str, Any]) -> None:
    """Refuse a journal that belongs to another identity, naming every key that differs; one that is not there is fine.

    Raises `IdentityError`, or `JournalError` for a file that is no journal.
    """
    try:
        descriptor = os.open(journal, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise JournalError(f"the journal {journal} cannot be opened: {error.strerror}") from error
    try:
        header = read_header(journal, descriptor)
    finally:
        os.close(descriptor)
    if header is not None:
        refuse_other_identity(journal, header.identity, identity)


def holder(lock: Path) -> str:
    """Who writes a journal, as far as its lock file says."""
    try:
        found = json.loads(lock.read_text())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"


def sync_folder(folder: Path) -> None:
    """Make a new file's name durable, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
