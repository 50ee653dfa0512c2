"""Model folders that are whole as far as a check can see: right headers, random weights."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

INDEX = "model.safetensors.index.json"
TEMPLATE = "{{ messages[0]['content'] }}"


def shard(*names: str, size: int = 8) -> bytes:
    """The bytes of a safetensors file with tensors of these names, `size` bytes each."""
    header = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [number * size, (number + 1) * size]}
        for number, name in enumerate(names)
    }
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + os.urandom(size * len(names))


def checkpoint(weights: dict[str, tuple[str, ...]], *, size: int = 8, index: bool | None = None) -> dict[str, bytes]:
    """Files of a checkpoint whose weight files have these tensors; with an index where there are several."""
    files = {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": json.dumps({"chat_template": TEMPLATE}).encode(),
        **{name: shard(*tensors, size=size) for name, tensors in weights.items()},
    }
    if index if index is not None else len(weights) > 1:
        weight_map = {tensor: name for name, tensors in weights.items() for tensor in tensors}
        files[INDEX] = index_of(weight_map)
    return files


def index_of(weight_map: dict[str, str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
