"""The adapter's side of the pipe: one job line in, event lines out."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from typing import Any


class Channel:
    """JSON lines to the host, on a file descriptor that nothing else in this process knows.

    Environments and libraries print. Their prints go to the log: descriptor 1 is pointed at standard error, and only
    this object keeps the pipe. Standard input is hidden likewise, so that no tool of an environment can read from it.
    """

    def __init__(self) -> None:
        self._in = os.fdopen(os.dup(0), "rb")
        self._out = os.dup(1)
        self._lock = threading.Lock()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdout.flush()
        os.dup2(2, 1)

    def receive_job(self) -> dict[str, Any]:
        line = self._in.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the host closed the pipe before it had sent the job")
        job: dict[str, Any] = json.loads(line)
        return job

    def send(self, event: str, **fields: Any) -> None:
        """Write one event whole; a host that is slow to read holds its sender back."""
        line = json.dumps(plain({"event": event, **fields}), ensure_ascii=False, separators=(",", ":"))
        data = memoryview(line.encode() + b"\n")
        with self._lock:
            while data:
                data = data[os.write(self._out, data) :]


def plain(value: Any) -> Any:
    """`value` as JSON can hold it, without loss where there is a way: models and bytes become data, the rest its text.

    A lone surrogate (half an emoji, as a model cut off at `max_tokens` may produce) becomes a replacement character,
    because no UTF-8 file can hold it.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict) or hasattr(value, "items"):
        return {plain(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json", exclude_none=True))
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    return str(value)
