"""Is a file what S3 says it is? The checksum that S3 keeps for the object is computed over the file on disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from modal_eval.checkpoints.s3_objects import RemoteObject

BLOCK = 4 << 20

Sizes = Callable[[bool], list[int]]
"""Sizes of the upload's parts; with `True` asked for one by one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a file has to come to."""

    algorithm: Literal["CRC64NVME", "CRC32C", "CRC32", "SHA256", "SHA1", "MD5"]
    value: bytes
    of_parts: bool
    """Whether the value is the algorithm's over the values of the upload's parts."""


def wanted_checksum(one: RemoteObject) -> Wanted | None:
    """The object's checksum, else its ETag where that is made of MD5 sums; `None` leaves only its size to check."""
    if one.algorithm and one.checksum:
        value, dash, _ = one.checksum.partition("-")
        return Wanted(one.algorithm, base64.b64decode(value), bool(dash))  # type: ignore[arg-type]
    if one.etag_is_md5:
        return Wanted("MD5", bytes.fromhex(one.etag.partition("-")[0]), one.parts is not None)
    return None


def damage(path: Path, one: RemoteObject, sizes: Sizes) -> str | None:
    """What is wrong with the file at `path`, or `None`. Reads the file once; twice before a checksum of parts is called wrong."""
    if (size := path.stat().st_size) != one.size:
        return f"{size} bytes, {one.size} on S3"
    wanted = wanted_checksum(one)
    if wanted is None:
        return None
    if wanted.of_parts:
        found = checksum_of_parts(path, wanted.algorithm, sizes(False))
        if found != wanted.value:
            found = checksum_of_parts(path, wanted.algorithm, sizes(True))
    else:
        found = digest_of(path, wanted.algorithm, 0, one.size)
    if found == wanted.value:
        return None
    return f"{wanted.algorithm} {found.hex()}, {wanted.value.hex()} on S3"


def checksum_of_parts(path: Path, algorithm: str, sizes: list[int]) -> bytes:
    """The algorithm's value over the concatenated values of parts of these sizes: how S3 sums up an upload in parts."""
    offsets = [sum(sizes[:number]) for number in range(len(sizes))]
    return summed_up(
        algorithm, [digest_of(path, algorithm, offset, size) for offset, size in zip(offsets, sizes, strict=True)]
    )


def joined(algorithm: str, digests: Sequence[bytes], sizes: Sequence[int]) -> bytes:
    """The CRC of a whole from the CRCs of its consecutive pieces."""
    from awscrt import checksums

    combine = getattr(checksums, f"combine_{algorithm.lower()}")
    value = 0
    for digest, size in zip(digests, sizes, strict=True):
        value = combine(value, int.from_bytes(digest, "big"), size)
    return int(value).to_bytes(CRC_BYTES[algorithm], "big")


def summed_up(algorithm: str, digests: Sequence[bytes]) -> bytes:
    """The algorithm's value over the values of an upload's parts."""
    summed = running(algorithm)
    for digest in digests:
        summed.update(digest)
    return summed.digest()


def digest_of(path: Path, algorithm: str, offset: int, size: int) -> bytes:
    """The algorithm's value over a piece of a file."""
    summed = running(algorithm)
    view = memoryview(bytearray(min(BLOCK, max(size, 1))))
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        left = size
        while left and (count := file.readinto(view[: min(left, len(view))])):
            summed.update(view[:count])
            left -= count
    return summed.digest()


class Running(Protocol):
    """hashlib's way to sum up."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


def running(algorithm: str) -> Running:
    if algorithm in CRC_BYTES:
        return _Crc(algorithm)
    return hashlib.new(algorithm.lower(), usedforsecurity=False)


CRC_BYTES = {"CRC32": 4, "CRC32C": 4, "CRC64NVME": 8}


class _Crc:
    def __init__(self, algorithm: str) -> None:
        from awscrt import checksums

        self._function = getattr(checksums, algorithm.lower())
        self._width = CRC_BYTES[algorithm]
        self._value: int = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = self._function(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width, "big")
