"""Checkpoints on S3: fetched once a node, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from modal_eval import paths
from modal_eval.checkpoints import cache
from modal_eval.checkpoints.cache import GB, Entry
from modal_eval.checkpoints.s3_objects import (
    SCHEME,
    Address,
    Kind,
    Manifest,
    RemoteObject,
    UnreachableError,
    client_for,
    look,
)
from modal_eval.checkpoints.s3_parts import PART_BYTES, Source, fetch_objects
from modal_eval.checkpoints.weights import INDEX, PYTORCH_INDEX, refuse_missing

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint on this node's disk."""

    path: Path
    """Its folder, or its GGUF file."""
    name: str
    """What the model is called: the last part of its address."""
    revision: str
    """`sha256:…` over the names, sizes, ETags and checksums of its objects."""
    size: int
    """Bytes that were fetched for it now; 0 when it was there."""


def is_address(model: str) -> bool:
    return model.startswith(SCHEME)


def fetch(typed: str, kind: Kind, *, part_bytes: int = PART_BYTES) -> Fetched:
    """Bring the checkpoint at `typed` into the cache, and hold it there until it is used or this process ends.

    What is there is not fetched again, and several processes on this node fetch it once. A fetch that was cut off goes on
    where it was. When S3 cannot be reached, the copy that this address gave last is taken. Raises `CheckpointError` in one
    line, and `IncompleteError` for a checkpoint that lacks files: before its weights are fetched.
    """
    address = Address.of(typed)
    try:
        client = client_for(address)
        manifest = look(client, address, kind)
    except UnreachableError as error:
        if found := _last_copy(address, kind):
            logger.warning("%s; taking the copy that was fetched before (%s)", error, found.revision[:19])
            return found
        raise
    entry = Entry(manifest.digest())
    size = 0
    while (hold := cache.try_use(entry)) is None:
        with cache.alone(entry):
            if not entry.is_ready():
                size += _fill(entry, Source(client, address, part_bytes), manifest)
    _remember(address, kind, manifest, entry)
    cache.keep_until_used(entry, hold)
    return _fetched(address, entry, manifest.objects[0].name, kind, size)


def _fill(entry: Entry, source: Source, manifest: Manifest) -> int:
    """Fetch what is missing of `manifest`: small files first, and weights only if the others say that all are there."""
    began = time.monotonic()
    distrust = cache.reopen(entry)
    cache.make_room(entry, manifest.size)
    logger.info("fetching %s: %.2f GB in %d files", source.address, manifest.size / GB, len(manifest.objects))
    small = [one for one in manifest.objects if not one.name.endswith(WEIGHTS)]
    size = fetch_objects(source, small, entry.unfinished, distrust=distrust)
    if manifest.kind == "folder":
        refuse_missing({one.name for one in manifest.objects}, _index(entry.unfinished), str(source.address))
    weights = [one for one in manifest.objects if one.name.endswith(WEIGHTS)]
    size += fetch_objects(source, weights, entry.unfinished, distrust=distrust)
    cache.finish(entry)
    took = time.monotonic() - began
    logger.info("fetched %s: %.2f GB in %.1f s", source.address, size / GB, took)
    return size


def _index(folder: Path) -> Path | None:
    return next((folder / name for name in (INDEX, PYTORCH_INDEX) if (folder / name).is_file()), None)


def _fetched(address: Address, entry: Entry, first: str, kind: Kind, size: int) -> Fetched:
    path = entry.folder / first if kind == "gguf" else entry.folder
    name = Path(first).stem if kind == "gguf" else address.name
    return Fetched(path, name, f"sha256:{entry.digest}", size)


def _note(address: Address, kind: Kind) -> Path:
    name = hashlib.sha256(f"{kind} {address}".encode()).hexdigest()[:32]
    return paths.cache_dir() / "checkpoints" / "addresses" / f"{name}.json"


def _remember(address: Address, kind: Kind, manifest: Manifest, entry: Entry) -> None:
    """Note which content this address gave last, and what it consists of."""
    path = _note(address, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{time.monotonic_ns()}")
    fresh.write_text(json.dumps({"address": str(address), "digest": entry.digest, **manifest.describe()}, indent=1))
    fresh.replace(path)


def _last_copy(address: Address, kind: Kind) -> Fetched | None:
    path = _note(address, kind)
    if not path.is_file():
        return None
    noted = json.loads(path.read_bytes())
    entry = Entry(noted["digest"])
    hold = cache.try_use(entry)
    if hold is None:
        return None
    cache.keep_until_used(entry, hold)
    return _fetched(address, entry, RemoteObject(**noted["objects"][0]).name, kind, 0)
