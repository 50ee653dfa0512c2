"""Is a model folder whole? Checked before a server starts, because a server finds out after a minute or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from modal_eval import paths
from modal_eval.errors import CheckpointError

INDEX = "model.safetensors.index.json"
PYTORCH_INDEX = "pytorch_model.bin.index.json"
SINGLE = "model.safetensors"
SINGLE_SHARD = "model-00001-of-00001.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tiktoken.model")
SAMPLES, SAMPLE_BYTES = 64, 4096


def check_folder(path: Path) -> None:
    """Raise `CheckpointError` naming the first file that is missing or cut short."""
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(
            f"{path} has no config.json, so it is no model folder (a GGUF file needs --infra.engine=llamacpp)"
        )
    try:
        json.loads(config.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{config} is broken ({error}); copy it again") from error
    if not any((path / name).is_file() for name in TOKENIZERS):
        raise CheckpointError(f"{path} has no tokenizer (none of {', '.join(TOKENIZERS)})")
    for shard in weight_files(path):
        check_shard(shard)


def weight_files(path: Path) -> list[Path]:
    if index := find_index(path):
        names = sorted(set(read_index(index).values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise CheckpointError(f"{path} lacks {', '.join(missing[:3])}{more}, named by {index.name}; copy it again")
        return [path / name for name in names]
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    if not found:
        raise CheckpointError(f"{path} has no weights (*.safetensors)")
    return found


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
    try:
        header, start = _header(file)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} has a broken header ({type(error).__name__}); copy it again") from error
    if start + end != size:
        raise CheckpointError(f"{file} is {size} bytes and should be {start + end}; it was not copied whole")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError("header longer than the file")
        header: dict[str, Any] = json.loads(opened.read(length))
        if not isinstance(header, dict):
            raise TypeError("header is no object")
        return header, 8 + length


def repaired(path: Path) -> Path:
    """The folder itself, or a folder of links in which index and weights agree; the source is never touched.

    Trainers leave an index that names `model-00001-of-00001.safetensors` beside a `model.safetensors`, or the reverse;
    vLLM then fails with `FileNotFoundError`.
    """
    if not (path / INDEX).is_file():
        return path
    named = set(read_index(path / INDEX).values())
    for wanted, there in ((SINGLE_SHARD, SINGLE), (SINGLE, SINGLE_SHARD)):
        if named == {wanted} and not (path / wanted).exists() and (path / there).is_file():
            return _linked(path, {there: wanted})
    return path


def _linked(path: Path, renamed: dict[str, str]) -> Path:
    stamp = hashlib.sha256(f"{path}{(path / INDEX).stat().st_mtime_ns}".encode()).hexdigest()[:12]
    folder = paths.state_dir() / "repaired" / f"{path.name}-{stamp}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in path.iterdir():
        link = folder / renamed.get(source.name, source.name)
        with contextlib.suppress(FileExistsError):  # made before, or by another run at this moment
            link.symlink_to(source)
    return folder


def header_bytes(file: Path) -> bytes:
    """What identifies a file's content without reading gigabytes: small files whole, weights by header and samples."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if file.suffix != ".safetensors" or size <= SAMPLES * SAMPLE_BYTES:
            return hashlib.file_digest(opened, "sha256").digest()
        digest = hashlib.sha256(opened.read(SAMPLE_BYTES))
        for part in range(1, SAMPLES + 1):
            opened.seek((size - SAMPLE_BYTES) * part // SAMPLES)
            digest.update(opened.read(SAMPLE_BYTES))
        return digest.digest()
