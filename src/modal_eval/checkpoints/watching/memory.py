"""What a watch remembers, in a folder or on S3, so that it may be killed at any moment.

One record an address, replaced as a whole: a reader finds the old one or the new one. `open/` holds a mark for each
address that is not done with; a mark is made before its record says so and removed after, so that one too many costs a
look and none is ever missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from modal_eval.checkpoints.s3_objects import SCHEME, Address, one_line
from modal_eval.checkpoints.watching.announcement import Announcement
from modal_eval.errors import CheckpointError


class ConflictError(CheckpointError):
    """Another watch has changed the record meanwhile; the next look takes that into account."""

    retryable = True


State = Literal["sending", "announced"]


@dataclass(frozen=True, slots=True)
class File:
    """What S3 says of one file's content."""

    size: int
    etag: str
    algorithm: str | None = None
    checksum: str | None = None

    def is_same(self, other: File) -> bool:
        """Whether both have one content; an upload in other parts, or under a KMS key, has another ETag."""
        if self.size != other.size:
            return False
        if self.etag == other.etag:
            return True
        known = self.checksum is not None and self.algorithm == other.algorithm
        return known and self.checksum == other.checksum and "-" not in str(self.checksum)


Files = Mapping[str, File]
"""A checkpoint's files by name."""


@dataclass(slots=True)
class Content:
    """One content that an address has had."""

    announcement: Announcement
    files: Files
    state: State

    def covers(self, files: Files) -> bool:
        """Whether `files` are this content, with files that came later, or while it is written once more."""
        common = self.files.keys() & files.keys()
        nested = len(common) == min(len(self.files), len(files))
        return nested and all(self.files[name].is_same(files[name]) for name in common)


@dataclass(slots=True)
class Record:
    """Everything that is remembered of one address."""

    address: str
    contents: list[Content] = field(default_factory=list)
    waiting: str | None = None
    """Why it is not announced yet; `None` where nothing is waited for."""
    seen: str | None = None
    """Digest of the listing for which `waiting` was found out, unless time alone can change it."""

    @property
    def is_open(self) -> bool:
        return self.waiting is not None or any(one.state == "sending" for one in self.contents)

    def content_of(self, files: Files) -> Content | None:
        return next((one for one in self.contents if one.covers(files)), None)

    def dump(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def load(cls, data: bytes) -> Record:
        found = json.loads(data)
        contents = [
            Content(
                Announcement(**one["announcement"]),
                {name: File(**file) for name, file in one["files"].items()},
                one["state"],
            )
            for one in found["contents"]
        ]
        return cls(found["address"], contents, found["waiting"], found["seen"])


class Store(Protocol):
    """Named bytes that survive. `version` is what a reader saw, and a writer replaces nothing else."""

    def locked(self) -> Any:
        """A context in which nobody else on this machine writes."""

    def get(self, name: str) -> tuple[bytes, str] | None: ...

    def put(self, name: str, data: bytes, version: str | None) -> str: ...

    def remove(self, name: str) -> None: ...

    def names(self, folder: str) -> list[str]: ...


class Memory:
    """The records of one watch."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._marked: set[str] = set()
        """Marks that are there; another process's are found by `open_addresses`."""

    @classmethod
    def at(cls, where: str, client: Any) -> Memory:
        """In a folder, or below an `s3://` address that `client` may read and write."""
        if where.startswith(SCHEME):
            return cls(Objects(client, Address.of(where)))
        return cls(Folder(Path(where).expanduser().absolute()))

    def mark(self, address: Address) -> None:
        """Have `address` looked at, whatever happens to this process; safe when it returns."""
        with self._store.locked():
            name = _name(address)
            if name not in self._marked:
                self._store.put(f"open/{name}", str(address).encode(), "")
                self._marked.add(name)

    @contextmanager
    def record(self, address: Address) -> Iterator[tuple[Record, Any]]:
        """Yield (record, save); what is saved is safe when `save()` returns.

        Raises `CheckpointError` when another machine changed the record meanwhile: look again.
        """
        name = _name(address)
        path = f"known/{name}.json"
        with self._store.locked():
            found = self._store.get(path)
            record = _load(found[0], path) if found else Record(str(address))
            version = found[1] if found else None

            def save() -> None:
                nonlocal version
                if record.is_open:
                    self.mark(address)
                version = self._store.put(path, record.dump(), version)

            yield record, save
            if not record.is_open and name in self._marked:
                self._store.remove(f"open/{name}")
                self._marked.discard(name)

    def open_addresses(self) -> list[Address]:
        """Addresses that were marked, are waited for, or whose announcement may not have gone out."""
        names = self._store.names("open")
        self._marked = set(names)
        found = (self._store.get(f"open/{name}") for name in names)
        return [Address.of(one[0].decode()) for one in found if one]


def _load(data: bytes, path: str) -> Record:
    try:
        return Record.load(data)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} in the watch's memory is broken ({type(error).__name__}); remove it, and what it was of is looked at anew"
        ) from error


def _name(address: Address) -> str:
    return hashlib.sha256(str(address).encode()).hexdigest()[:32]


class Folder:
    """Files of this machine, for watches that all run on it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.RLock()
        self._held = 0

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._threads:
            if self._held:
                yield
                return
            self._path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                self._held += 1
                yield
            finally:
                self._held = 0
                os.close(descriptor)

    def get(self, name: str) -> tuple[bytes, str] | None:
        with suppress(FileNotFoundError):
            return (self._path / name).read_bytes(), ""
        return None

    def put(self, name: str, data: bytes, version: str | None) -> str:
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        self._sync(path.parent)
        return ""

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            return sorted(one.name for one in (self._path / folder).iterdir() if one.suffix != ".new")
        return []

    def _sync(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Objects:
    """Objects on S3, for watches on several machines: who writes on an old reading is refused."""

    def __init__(self, client: Any, where: Address) -> None:
        self._client = client
        self._where = where
        self._read: dict[str, tuple[bytes, str]] = {}
        """What was read or written last: thousands of records are not fetched anew for each look."""
        self._threads = threading.RLock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._threads:
            yield

    def _key(self, name: str) -> str:
        return f"{self._where.prefix}/{name}".lstrip("/")

    def get(self, name: str) -> tuple[bytes, str] | None:
        if name in self._read:
            return self._read[name]
        with one_line(self._where):
            try:
                found = self._client.get_object(Bucket=self._where.bucket, Key=self._key(name))
            except self._client.exceptions.NoSuchKey:
                return None
            self._read[name] = (found["Body"].read(), found["ETag"])
        return self._read[name]

    def put(self, name: str, data: bytes, version: str | None) -> str:
        from botocore.exceptions import ClientError

        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"} if version is None else {}
        with one_line(self._where):
            try:
                etag: str = self._client.put_object(
                    Bucket=self._where.bucket, Key=self._key(name), Body=data, **condition
                )["ETag"]
            except ClientError as error:
                self._read.pop(name, None)
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412):
                    raise ConflictError(
                        f"{self._where}/{name} was changed by another watch; the next look takes it into account"
                    ) from error
                raise
        self._read[name] = (data, etag)
        return etag

    def remove(self, name: str) -> None:
        with one_line(self._where):
            self._client.delete_object(Bucket=self._where.bucket, Key=self._key(name))
        self._read.pop(name, None)

    def names(self, folder: str) -> list[str]:
        prefix = self._key(folder) + "/"
        with one_line(self._where):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._where.bucket, Prefix=prefix)
            return [entry["Key"][len(prefix) :] for page in pages for entry in page.get("Contents", [])]
