"""Leases of servers that are processes of no consequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modal_eval.processes import OwnedProcess
from modal_eval.records import Lease
from modal_eval.serving.leases import note_server, take_lease, write_lease


def server_of(lease_id: str, process: OwnedProcess, **facts: Any) -> Lease:
    """The lease of a server here, with `facts` in place of a live run's."""
    lease = note_server(take_lease(None, "org/model", lease_id), process.pid, process.started, "http://127.0.0.1:9")
    lease = replace(lease, **facts)
    write_lease(lease)
    return lease
