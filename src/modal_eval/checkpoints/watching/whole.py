"""Is a checkpoint on S3 whole? Asked by the rule that its node will apply, without fetching its weights."""

from __future__ import annotations

import json
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from modal_eval.checkpoints.repair import right_index
from modal_eval.checkpoints.s3_objects import CONNECTIONS, Address, Manifest, RemoteObject, look, one_line
from modal_eval.checkpoints.weights import INDEX, PYTORCH_INDEX, check_folder, find_index, refuse_missing

FIRST_READ = 1 << 16
"""Most headers are shorter, and a longer one costs a second request."""
MAX_HEADER = 100 << 20
"""A header that claims more is none; safetensors itself refuses more."""
READ_WHOLE = ("config.json", INDEX, PYTORCH_INDEX)


def whole(client: Any, address: Address) -> Manifest:
    """The checkpoint at `address`, if an engine could load it.

    The folder is rebuilt with its small files and the headers of its weights, at their full size and without their
    content; on it the rule for folders is asked, and the repair of an index that disagrees with its weights. Raises
    `CheckpointError` that says what is missing or broken.
    """
    manifest = look(client, address, "folder")
    with tempfile.TemporaryDirectory(prefix="modal-eval-look-") as name:
        folder = Path(name)
        small = [one for one in manifest.objects if one.name in READ_WHOLE]
        heads = [one for one in manifest.objects if one.name.endswith(".safetensors")]
        _fetch(client, address, small, folder)
        refuse_missing({one.name for one in manifest.objects}, find_index(folder), str(address))
        _fetch(client, address, heads, folder)
        for one in manifest.objects:
            with (folder / one.name).open("ab") as file:
                file.truncate(one.size)
        if weight_map := right_index(folder, str(address)):
            (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        check_folder(folder, str(address))
    return manifest


def _fetch(client: Any, address: Address, objects: list[RemoteObject], folder: Path) -> None:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for one, content in zip(objects, pool.map(lambda one: _content(client, address, one), objects), strict=True):
            (folder / one.name).write_bytes(content)


def _content(client: Any, address: Address, one: RemoteObject) -> bytes:
    """A small file, or as much of a safetensors file as its header."""
    if not one.name.endswith(".safetensors"):
        return _range(client, address, one, 0, one.size)
    head = _range(client, address, one, 0, min(one.size, FIRST_READ))
    if len(head) < 8:
        return head
    end = 8 + min(struct.unpack("<Q", head[:8])[0], MAX_HEADER)
    return head + _range(client, address, one, len(head), min(end, one.size))


def _range(client: Any, address: Address, one: RemoteObject, start: int, end: int) -> bytes:
    if end <= start:
        return b""
    with one_line(address):
        found = client.get_object(
            Bucket=address.bucket, Key=one.key, Range=f"bytes={start}-{end - 1}", IfMatch=f'"{one.etag}"'
        )
        return bytes(found["Body"].read())
