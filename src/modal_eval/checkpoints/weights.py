"""Is a model folder whole? Checked before a server starts, because a server finds out after a minute or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from modal_eval.errors import CheckpointError, IncompleteError

INDEX = "model.safetensors.index.json"
PYTORCH_INDEX = "pytorch_model.bin.index.json"
SINGLE = "model.safetensors"
SINGLE_SHARD = "model-00001-of-00001.safetensors"
NUMBERED = re.compile(r"^(.*)-(\d{5})-of-(\d{5})(\.safetensors|\.bin)$")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
SAMPLES, SAMPLE_BYTES = 64, 4096


def check_folder(path: Path, shown: str | None = None) -> None:
    """Raise `IncompleteError` naming what is missing or cut short, `CheckpointError` naming what is broken.

    `shown` is what the folder is called in the message, where its path means nothing to the reader.
    """
    shown = shown or str(path)
    refuse_missing({one.name for one in path.iterdir() if one.is_file()}, find_index(path), shown)
    config = path / "config.json"
    try:
        json.loads(config.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{config} is broken ({error}); copy it again") from error
    shards = weight_files(path)
    for shard in shards:
        check_shard(shard)
    index = find_index(path)
    if index and index.name == INDEX:
        refuse_missing_tensors(path, read_index(index), shown)


def refuse_missing(names: Collection[str], index: Path | None, shown: str) -> None:
    """Raise `IncompleteError` for a checkpoint of files with these `names` that lacks one.

    Its shards are those that the index names; without an index, or with one that knows none of the files, all that count
    themselves (`…-00001-of-00003.safetensors`).
    """
    lacking = [] if "config.json" in names else ["config.json"]
    if not any(name in names for name in TOKENIZERS):
        lacking.append(f"a tokenizer (none of {', '.join(TOKENIZERS)})")
    named = set(read_index(index).values()) if index else set()
    weights = {name for name in names if name.endswith(".safetensors")} or {
        name for name in names if re.match(r"pytorch_model.*\.bin$", name)
    }
    if not weights:
        lacking.append("weights (*.safetensors)")
    elif index and (named & weights or not _whole_without_index(weights)):
        missing = sorted(named - weights)
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        lacking += [f"{', '.join(missing[:3])}{more}, named by {index.name}"] if missing else []
    else:
        lacking += missing_numbers(weights)[:3]
    if lacking:
        hint = " (a GGUF file needs --infra.engine=llamacpp)" if lacking[0] == "config.json" else ""
        raise IncompleteError(
            f"{shown} is incomplete: it lacks {'; '.join(lacking)}{hint}; wait until it is written, or copy it again"
        )


def _whole_without_index(weights: set[str]) -> bool:
    """Whether these files may be all of a model's weights although an index names others."""
    return SINGLE in weights or (any(NUMBERED.match(name) for name in weights) and not missing_numbers(weights))


def missing_numbers(names: Collection[str]) -> list[str]:
    """Of files that are numbered `-00001-of-00003`, those that are not there."""
    groups = {(found[1], found[3], found[4]) for name in names if (found := NUMBERED.match(name))}
    wanted = [f"{stem}-{n:05}-of-{of}{end}" for stem, of, end in sorted(groups) for n in range(1, int(of) + 1)]
    return [name for name in wanted if name not in names]


def weight_files(path: Path) -> list[Path]:
    """The files that the index names, else all."""
    if index := find_index(path):
        return [path / name for name in sorted(set(read_index(index).values()))]
    return sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def find_index(path: Path) -> Path | None:
    return next((path / name for name in (INDEX, PYTORCH_INDEX) if (path / name).is_file()), None)


def read_index(index: Path) -> dict[str, str]:
    """Tensor name → file name."""
    try:
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(tensor): str(file) for tensor, file in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is broken ({type(error).__name__}: {error}); copy it again") from error


def check_shard(file: Path) -> None:
    """The header of a safetensors file says how long the file has to be."""
    if file.suffix != ".safetensors":
        return
    size = file.stat().st_size
    header, start = _header(file)
    try:
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{file} has a broken header ({type(error).__name__}); copy it again") from error
    if start + end > size:
        raise IncompleteError(f"{file} is {size} bytes and should be {start + end}; it was not copied whole")
    if start + end < size:
        raise CheckpointError(f"{file} is {size} bytes and should be {start + end}; copy it again")


def tensors_in(file: Path) -> set[str]:
    """Names of the tensors that a safetensors file says it has."""
    return set(_header(file)[0]) - {"__metadata__"}


def refuse_missing_tensors(path: Path, named: Mapping[str, str], shown: str) -> None:
    """Raise `IncompleteError` naming tensors of the index that their shards do not have."""
    there = {name: tensors_in(path / name) for name in set(named.values())}
    missing = [tensor for tensor in sorted(named) if tensor not in there[named[tensor]] and not is_tied(path, tensor)]
    if missing:
        more = f" and {len(missing) - 3} more tensors" if len(missing) > 3 else ""
        raise IncompleteError(
            f"{shown} is incomplete: {named[missing[0]]} lacks {', '.join(missing[:3])}{more}, which {INDEX} promises; wait "
            "until it is written, or copy it again"
        )


def is_tied(path: Path, tensor: str) -> bool:
    """Whether a tensor may be missing because it is the embeddings once more (`tie_word_embeddings`)."""
    if tensor != "lm_head.weight":
        return False
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("tie_word_embeddings") is True


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin. Raises `CheckpointError` for a file that is no safetensors file."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, file.stat().st_size)))
    except (struct.error, ValueError) as error:
        raise CheckpointError(f"{file} has a broken header ({type(error).__name__}); copy it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a broken header (no object); copy it again")
    return header, 8 + length


def header_bytes(file: Path) -> bytes:
    """What identifies a file's content without reading gigabytes: small files whole, weights by header and samples."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if file.suffix not in (".safetensors", ".bin") or size <= SAMPLES * SAMPLE_BYTES:
            return hashlib.file_digest(opened, "sha256").digest()
        digest = hashlib.sha256(opened.read(SAMPLE_BYTES))
        for part in range(1, SAMPLES + 1):
            opened.seek((size - SAMPLE_BYTES) * part // SAMPLES)
            digest.update(opened.read(SAMPLE_BYTES))
        return digest.digest()
