"""What the proxy process is told when it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class ProxySettings:
    journal: Path
    identity: dict[str, Any]
    """Whom the journal belongs to; another identity is refused."""
    upstreams: tuple[str, ...]
    """Bases ending in `/v1`, one per replica; none means that only the journal answers."""
    model: str
    """The model name that requests carry."""
    api_key_env: str | None
    """Name of the environment variable with the upstream's key; the key itself never leaves the environment."""
    max_in_flight: int
    """Calls upstream at a time; further ones wait in the order they came."""
    call_timeout_s: float
    """Longest time for one call over all its tries and redirects, from the moment it is its turn."""
    retries: int
    """Tries after a fault of a server that is there. One that is away is waited for, by `outage_timeout_s`."""
    log_path: Path
    silence_timeout_s: float = 1800.0
    """A call on which the server sends nothing for this long is made again."""
    connect_timeout_s: float = 10.0
    outage_timeout_s: float = 600.0
    """Longest time that a server may be away or busy (no connection, 429, 502, 503) before its calls fail."""
    retry_base_s: float = 0.5
    """First wait between tries; doubled each time up to `retry_cap_s`, with full jitter."""
    retry_cap_s: float = 30.0
    keep_alive_s: float = 15.0
    """A stream's harness hears a comment this often while its answer is not whole yet."""
    reserve_bytes: int = 16 * 2**20
    """Disk space held back so that answers in flight can be written when the disk is full."""

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "journal": str(self.journal), "log_path": str(self.log_path)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        paths = {name: Path(data[name]) for name in ("journal", "log_path")}
        return cls(**{**data, **paths, "upstreams": tuple(data["upstreams"])})
