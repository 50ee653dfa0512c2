"""What the head of a GGUF file says: is the file whole, and which chat template does it bring?"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modal_eval.errors import CheckpointError

MAGIC = b"GGUF"
CHAT_TEMPLATE = "tokenizer.chat_template"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LONGEST_STRING = 1 << 24


@dataclass(frozen=True, slots=True)
class Head:
    metadata: dict[str, Any]
    """Scalars and texts by key; arrays (the vocabulary) are left out."""
    least_size: int
    """The last tensor begins here: a shorter file was cut off."""


def check_gguf(path: Path) -> Head:
    """Read the head of `path`. Raises `CheckpointError` when it is no GGUF file or was not copied whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is no GGUF file (it does not begin with 'GGUF'); copy it again")
        try:
            head = _head(file)
        except (struct.error, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} has a broken GGUF header ({error}); copy it again") from error
    if size < head.least_size:
        raise CheckpointError(
            f"{path} is {size} bytes, and its last tensor begins at {head.least_size}; it was not copied whole"
        )
    return head


def _head(file: BinaryIO) -> Head:
    version, tensors, pairs = _read(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"version {version}, known are 2 and 3")
    metadata: dict[str, Any] = {}
    for _ in range(pairs):
        key = _text(file)
        value = _value(file, *_read(file, "I"))
        if value is not None:
            metadata[key] = value
    last = -1
    for _ in range(tensors):
        _text(file)
        (dimensions,) = _read(file, "I")
        *_, offset = _read(file, f"{dimensions}QIQ")
        last = max(last, offset)
    alignment = int(metadata.get("general.alignment", 32))
    data = -(-file.tell() // alignment) * alignment
    return Head(metadata, data + last + 1 if tensors else file.tell())


def _value(file: BinaryIO, kind: int) -> Any:
    """One metadata value; `None` for an array, which is only stepped over."""
    if kind == STRING:
        return _text(file)
    if kind != ARRAY:
        return _read(file, SCALARS[kind])[0]
    inner, count = _read(file, "IQ")
    if inner in SCALARS:
        file.seek(struct.calcsize(SCALARS[inner]) * count, 1)
    else:
        for _ in range(count):
            _value(file, inner)
    return None


def _text(file: BinaryIO) -> str:
    (length,) = _read(file, "Q")
    if length > LONGEST_STRING:
        raise ValueError(f"a text of {length} bytes")
    raw = file.read(length)
    if len(raw) != length:
        raise ValueError("the file ends in its header")
    return raw.decode("utf-8", errors="replace")


def _read(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))
