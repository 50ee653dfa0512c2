"""Fetch objects in ranges, many at a time, so that a killed fetch goes on where it was."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modal_eval.checkpoints.s3_checksums import (
    CRC_BYTES,
    Sizes,
    damage,
    digest_of,
    joined,
    running,
    summed_up,
    wanted_checksum,
)
from modal_eval.checkpoints.s3_objects import CONNECTIONS, Address, RemoteObject, changed, one_line, part_sizes
from modal_eval.errors import CheckpointError

logger = logging.getLogger(__name__)

PART_BYTES = 16 << 20
MOST_PART_BYTES = 64 << 20
BLOCK = 256 << 10
TRIES = 6
UNFINISHED = ".part"
FINISHED_PARTS = ".parts"
DONE_LINE = re.compile(rb"^(\d+) ((?:[0-9a-f]{2})+)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the objects come from, and in what pieces."""

    client: Any
    address: Address
    part_bytes: int = PART_BYTES


class PartFile:
    """One object on its way to disk.

    `NAME.part` holds the bytes, `NAME.parts` a line for each part that is whole, with its checksum. A part is noted after
    its bytes were written: what a killed process has noted, the kernel has. After the machine itself has died, the
    checksum tells which parts did not reach the disk.

    Where S3's checksum can be put together from those of the parts, the file need not be read again: that is so for a CRC
    of the whole, and for a checksum over those of the upload's parts, which are then also ours.
    """

    def __init__(self, folder: Path, one: RemoteObject, part_bytes: int, sizes: Sizes) -> None:
        self.object = one
        self.path = folder / one.name
        self._sizes = sizes
        self._wanted = wanted_checksum(one)
        self._joinable = bool(self._wanted and not self._wanted.of_parts and self._wanted.algorithm in CRC_BYTES)
        self._part_bytes = part_bytes
        if uploaded := self._upload_part_bytes():
            self._joinable, self._part_bytes = True, uploaded
        self.algorithm = self._wanted.algorithm if self._wanted and self._joinable else "CRC32"
        """Of the parts' own checksums."""
        self._unfinished = folder / (one.name + UNFINISHED)
        self._noted = folder / (one.name + FINISHED_PARTS)
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """The kernel lets one thread at a time write to a file, and the others burn a core while they wait for it."""
        self._digests: dict[int, bytes] = {}
        self.owed = self._owed()
        """Numbers of the parts that are still to be fetched."""

    def _upload_part_bytes(self) -> int | None:
        """Size of the upload's parts where S3's checksum is made of theirs; `None` where they are unequal or too large."""
        if not (self._wanted and self._wanted.of_parts):
            return None
        sizes = self._sizes(False)
        return sizes[0] if len(set(sizes[:-1])) <= 1 and sizes[0] <= MOST_PART_BYTES else None

    def _owed(self) -> set[int]:
        numbers = set(range(-(-self.object.size // self._part_bytes)))
        facts = {"etag": self.object.etag, "size": self.object.size, "part_bytes": self._part_bytes}
        head = json.dumps({**facts, "algorithm": self.algorithm}) + "\n"
        noted = self._noted.read_bytes() if self._noted.is_file() and self._unfinished.is_file() else b""
        if not noted.startswith(head.encode()):
            self._noted.write_text(head)
            with self._unfinished.open("wb") as file:
                file.truncate(self.object.size)
            return numbers
        if not noted.endswith(b"\n"):  # a torn line: what follows must not be glued to it
            with self._noted.open("ab") as file:
                file.write(b"\n")
        said = {int(number): bytes.fromhex(digest.decode()) for number, digest in DONE_LINE.findall(noted)}
        for number, digest in said.items():
            start, end = self.range(number)
            if digest_of(self._unfinished, self.algorithm, start, end - start) == digest:
                self._digests[number] = digest
        return numbers - self._digests.keys()

    def range(self, number: int) -> tuple[int, int]:
        """First byte of a part, and the one behind its last."""
        start = number * self._part_bytes
        return start, min(start + self._part_bytes, self.object.size)

    def opened(self) -> int:
        return os.open(self._unfinished, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, descriptor: int, block: bytes, offset: int) -> int:
        view = memoryview(block)
        with self._writing:
            while view:
                count = os.pwrite(descriptor, view, offset)
                offset, view = offset + count, view[count:]
        return len(block)

    def note(self, number: int, digest: bytes) -> bool:
        """Note that a part is whole; returns whether it was the last one owed."""
        with self._lock:
            with self._noted.open("ab") as file:
                file.write(f"{number} {digest.hex()}\n".encode())
            self._digests[number] = digest
            self.owed.discard(number)
            return not self.owed

    def finish(self) -> str | None:
        """Give the file its name if it is what S3 has; else forget all of it and say what is wrong."""
        wrong = None if self._comes_to_what_s3_has() else damage(self._unfinished, self.object, self._sizes)
        if wrong is None:
            self._unfinished.rename(self.path)
        self._noted.unlink()
        if wrong is not None:
            self._unfinished.unlink()
        return wrong

    def _comes_to_what_s3_has(self) -> bool:
        if not (self._wanted and self._joinable):
            return False
        digests = [self._digests[number] for number in sorted(self._digests)]
        if self._wanted.of_parts:
            return summed_up(self.algorithm, digests) == self._wanted.value
        ranges = [self.range(number) for number in range(len(digests))]
        return joined(self.algorithm, digests, [end - start for start, end in ranges]) == self._wanted.value


def fetch_objects(source: Source, objects: Sequence[RemoteObject], folder: Path, *, distrust: bool = False) -> int:
    """Bring `objects` into `folder`, each checked; returns the bytes that were fetched.

    Files that stand there already are taken as they are, or with `distrust` checked first. A file that does not come out
    right is fetched once more. Raises `CheckpointError` when it is wrong again, or when an object changed meanwhile.
    """
    fetched = _fetch_once(source, _missing(source, objects, folder, distrust=distrust), folder)
    wrong = fetched.damaged
    if wrong:
        for name, what in wrong.items():
            logger.warning("%s of %s arrived damaged (%s) and is fetched again", name, source.address, what)
        again = _fetch_once(source, [one for one in objects if one.name in wrong], folder)
        if again.damaged:
            name, what = next(iter(again.damaged.items()))
            raise CheckpointError(
                f"{name} of {source.address} arrived damaged twice ({what}); fetch it by hand and give the folder, or "
                "upload it again"
            )
        return fetched.size + again.size
    return fetched.size


def _missing(source: Source, objects: Sequence[RemoteObject], folder: Path, *, distrust: bool) -> list[RemoteObject]:
    missing = []
    for one in objects:
        path = folder / one.name
        if path.is_file() and distrust and damage(path, one, _sizes(source, one)):
            path.unlink()
        if not path.is_file():
            missing.append(one)
    return missing


def _sizes(source: Source, one: RemoteObject) -> Sizes:
    return lambda exactly: part_sizes(source.client, source.address, one, exactly=exactly)


@dataclass
class _Fetched:
    size: int
    damaged: dict[str, str]


class _Stopped(Exception):  # noqa: N818 - no error: another part has failed already
    pass


def _fetch_once(source: Source, objects: Sequence[RemoteObject], folder: Path) -> _Fetched:
    result = _Fetched(0, {})
    lock = threading.Lock()
    stop = threading.Event()

    def work(file: PartFile, number: int | None) -> None:
        if number is not None:
            count, last = _fetch_part(source, file, number, stop)
            with lock:
                result.size += count
            if not last:
                return
        if wrong := file.finish():
            with lock:
                result.damaged[file.object.name] = wrong

    with one_line(source.address), _pool(stop) as pool:
        futures: list[Future[None]] = []
        for one in sorted(objects, key=lambda one: one.size):
            file = PartFile(folder, one, source.part_bytes, _sizes(source, one))
            futures += [pool.submit(work, file, number) for number in _or_none(sorted(file.owed))]
        if futures:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            errors = [error for future in done if (error := future.exception())]
            for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
                raise error
    return result


def _or_none(numbers: list[int]) -> Sequence[int | None]:
    """A file without owed parts still has to be checked and named."""
    return numbers or [None]


@contextlib.contextmanager
def _pool(stop: threading.Event) -> Iterator[ThreadPoolExecutor]:
    """Threads that end at their next block when the caller is cut off."""
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="s3")
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _fetch_part(source: Source, file: PartFile, number: int, stop: threading.Event) -> tuple[int, bool]:
    """Fetch one part, taking up a broken stream where it broke; returns its size, and whether the file is now whole."""
    start, end = file.range(number)
    offset, summed = start, running(file.algorithm)
    descriptor = file.opened()
    try:
        for attempt in range(TRIES):
            try:
                for block in _blocks(source, file.object, offset, end):
                    if stop.is_set():
                        raise _Stopped
                    offset += file.write(descriptor, block, offset)
                    summed.update(block)
                break
            except _broken_streams():
                if attempt == TRIES - 1:
                    raise
                stop.wait(min(0.2 * 2**attempt, 5))
    finally:
        os.close(descriptor)
    return end - start, file.note(number, summed.digest())


def _blocks(source: Source, one: RemoteObject, start: int, end: int) -> Iterator[bytes]:
    answer = source.client.get_object(
        Bucket=source.address.bucket, Key=one.key, Range=f"bytes={start}-{end - 1}", IfMatch=f'"{one.etag}"'
    )
    with contextlib.closing(answer["Body"]) as body:
        wanted = f"bytes {start}-{end - 1}/{one.size}"
        if answer.get("ContentRange") != wanted:
            raise CheckpointError(
                f"S3 sent '{answer.get('ContentRange')}' of {one.name} where '{wanted}' was asked for; "
                f"{changed(source.address)}"
            )
        while block := body.read(BLOCK):
            yield block


def _broken_streams() -> tuple[type[Exception], ...]:
    """What a body raises that ends before its time; a request that fails as a whole is tried again by boto3 itself."""
    from botocore import exceptions as boto

    return (boto.IncompleteReadError, boto.HTTPClientError, boto.ConnectionError, ConnectionError)
