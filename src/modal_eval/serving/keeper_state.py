"""What a keeper and those who use its server tell each other: two files in the server's folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from modal_eval.processes import boot_id, is_alive, start_ticks
from modal_eval.serving.leases import now

ASKED, STATE = "asked.json", "state.json"
"""What server is wanted, and how far it is."""


@dataclass
class State:
    """What the keeper says of itself."""

    pid: int
    started: float
    boot_id: str
    since: str
    said: list[str] = field(default_factory=list)
    """What it did, the latest words only."""
    said_count: int = 0
    urls: list[str] = field(default_factory=list)
    """Empty until every replica has answered."""
    facts: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    """Why there is no server."""
    fault_kind: str = ""

    @classmethod
    def mine(cls) -> Self:
        return cls(os.getpid(), start_ticks(os.getpid()), boot_id(), now())

    @property
    def alive(self) -> bool:
        return self.boot_id == boot_id() and is_alive(self.pid, self.started)


def read_state(folder: Path) -> State | None:
    """What the keeper of `folder` said last; `None` when it has said nothing, or ended in order."""
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
