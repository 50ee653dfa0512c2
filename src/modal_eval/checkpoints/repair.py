"""A folder whose index and weights disagree, as the trainer meant it: links to its files, and a new index.

Trainers leave an index that names `model-00001-of-00001.safetensors` beside a `model.safetensors`, or the reverse, or the
index of the model that they started from. vLLM loads only files that the index names, and then fails or finds nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from modal_eval import paths
from modal_eval.checkpoints.weights import INDEX, NUMBERED, SINGLE, is_tied, read_index, tensors_in
from modal_eval.errors import CheckpointError


def repaired(path: Path, shown: str | None = None) -> Path:
    """The folder itself where its index is right, else a folder of links with a right one; the source is never touched.

    Raises `CheckpointError` naming what cannot be repaired: a tensor that is nowhere, or two sets of weights of which
    either could be meant. What is merely missing is left for `check_folder` to name.
    """
    weight_map = right_index(path, shown)
    return path if weight_map is None else _linked(path, weight_map)


def right_index(path: Path, shown: str | None = None) -> dict[str, str] | None:
    """Tensor → file, where the folder's own index is wrong and its weights tell the right one; raises as `repaired` does."""
    if not (path / INDEX).is_file():
        return None
    named = read_index(path / INDEX)
    there = {file.name: tensors_in(file) for file in sorted(path.glob("*.safetensors"))}
    if all(tensor in there.get(file, ()) or is_tied(path, tensor) for tensor, file in named.items()):
        return None
    candidates = _candidates(named, there)
    whole = [files for files in candidates if not _lacking(path, named, there, files)]
    if len(whole) == 1:
        return {tensor: file for file in whole[0] for tensor in there[file]}
    if len(whole) > 1:
        sets = " or ".join(f"{files[0]}{' …' if len(files) > 1 else ''}" for files in whole)
        raise CheckpointError(
            f"{shown or path} cannot be repaired: {INDEX} fits none of its weights, and {sets} could be meant; remove "
            "the one that is not"
        )
    if candidates and not set(named.values()) & there.keys():
        lacking = _lacking(path, named, there, candidates[0])
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CheckpointError(
            f"{shown or path} cannot be repaired: {INDEX} names {min(named.values())}, which is not there, and "
            f"{candidates[0][0]} lacks {', '.join(lacking[:3])}{more}; copy it again"
        )
    return None


def _candidates(named: Mapping[str, str], there: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of files that may be the whole model: those that the index names, the single file, each numbered set."""
    found = [sorted(set(named.values())), [SINGLE]]
    groups = sorted({(match[1], match[3]) for name in there if (match := NUMBERED.match(name))})
    for stem, of in groups:
        found.append([f"{stem}-{number:05}-of-{of}.safetensors" for number in range(1, int(of) + 1)])
    unique = {tuple(files): files for files in found if files and all(name in there for name in files)}
    return list(unique.values())


def _lacking(path: Path, named: Mapping[str, str], there: Mapping[str, set[str]], files: list[str]) -> list[str]:
    held = set().union(*(there[name] for name in files))
    return sorted(tensor for tensor in named if tensor not in held and not is_tied(path, tensor))


def _linked(path: Path, weight_map: Mapping[str, str]) -> Path:
    """Links to all files of `path` but the index and weights that `weight_map` does not name."""
    files = [
        file
        for file in sorted(path.iterdir())
        if file.name != INDEX and (file.suffix != ".safetensors" or file.name in weight_map.values())
    ]
    seen = [(file.name, stat.st_size, stat.st_mtime_ns) for file in files if (stat := file.stat())]
    stamp = hashlib.sha256(json.dumps([str(path), seen, sorted(weight_map.items())]).encode()).hexdigest()[:12]
    folder = paths.cache_dir() / "repaired" / f"{path.name}-{stamp}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for file in files:
        (fresh / file.name).symlink_to(file)
    total = sum((path / name).stat().st_size for name in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (fresh / INDEX).write_text(json.dumps(index, indent=2))
    fresh.chmod(0o755)
    try:
        fresh.rename(folder)
    except OSError:  # another run has made it meanwhile
        shutil.rmtree(fresh)
    return folder
