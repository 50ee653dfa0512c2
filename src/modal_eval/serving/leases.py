"""Who holds which server: one file a server, written before the server is waited for.

Any process can end a server by its lease: the one that started it, the next run, or `modal-eval stop`.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from modal_eval import paths
from modal_eval.processes import boot_id, guardian_of, is_alive, kill_group, start_ticks, wait_until_ended
from modal_eval.records import Lease
from modal_eval.serving.prices import UNKNOWN, Price

GUARDIAN_S = 15.0
"""A guardian ends in milliseconds once its command has, with whatever moved out of the command's session."""


def new_lease_id() -> str:
    return secrets.token_hex(6)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def take_lease(
    run_dir: Path | None,
    model: str,
    lease_id: str,
    *,
    kind: Literal["process", "keeper", "modal"] = "process",
    app: str = "",
    since: str = "",
    deadline: float | None = None,
    keep_s: float = 0.0,
    price: Price = UNKNOWN,
    account: str = "",
) -> Lease:
    """Write the lease of a server that is about to be started, or of a share in the one that is called `app`."""
    lease = Lease(
        lease_id=lease_id,
        kind=kind,
        run_dir=str(run_dir or ""),
        host=socket.gethostname(),
        boot_id=boot_id(),
        holder_pid=os.getpid(),
        holder_started=start_ticks(os.getpid()),
        server_pid=0,
        server_started=0,
        created_at=now(),
        deadline=deadline,
        model=model,
        app=app,
        since=since,
        gpus=price.gpus,
        gpu=price.gpu,
        hour_price=price.an_hour,
        price_is_estimate=price.is_estimate,
        keep_s=keep_s,
        account=account,
    )
    write_lease(lease)
    return lease


def note_server(lease: Lease, pid: int, started: float, url: str) -> Lease:
    lease = replace(lease, server_pid=pid, server_started=started, url=url)
    write_lease(lease)
    return lease


def lease_path(lease: Lease) -> Path:
    return paths.leases_dir() / f"{lease.lease_id}.json"


def write_lease(lease: Lease) -> None:
    write_whole(lease_path(lease), asdict(lease))


def write_whole(path: Path, value: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2), encoding="utf-8")
    temporary.replace(path)


def drop_lease(lease: Lease) -> None:
    lease_path(lease).unlink(missing_ok=True)


def read_lease(path: Path) -> Lease | None:
    """The lease in `path`; `None` when it is gone or not whole (its writer was killed before the rename)."""
    try:
        return Lease(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError, TypeError):
        return None


def lease_of(lease_id: str) -> Lease | None:
    return read_lease(paths.leases_dir() / f"{lease_id}.json")


def leases() -> list[Lease]:
    """Every lease of this user on this machine, oldest first."""
    found = [lease for path in paths.leases_dir().glob("*.json") if (lease := read_lease(path))]
    return sorted(found, key=lambda lease: (lease.created_at, lease.lease_id))


def family(lease_id: str) -> list[Lease]:
    """The leases of all replicas of one server: `ID`, `ID-1`, `ID-2` …"""
    return [lease for lease in leases() if family_of(lease) == lease_id]


def family_of(lease: Lease) -> str:
    return lease.lease_id.partition("-")[0]


def holder_alive(lease: Lease) -> bool:
    """Whether the process that took the lease still runs (the same process, not one with its old pid).

    The holder of another host's lease, seen where home folders are shared, is taken to be alive: only that host knows.
    """
    if lease.host != socket.gethostname():
        return True
    return lease.boot_id == boot_id() and is_alive(lease.holder_pid, lease.holder_started)


def is_live(lease: Lease) -> bool:
    """Whether somebody still has a right to the server: its holder, or whoever it is kept for.

    A share in what a keeper had here is worth nothing once that keeper has ended.
    """
    if lease.deadline is not None and lease.deadline < time.time():
        return False
    if lease.kind == "keeper" and lease.host == socket.gethostname() and lease.server_pid and not server_alive(lease):
        return False
    return lease.kept or holder_alive(lease)


def server_alive(lease: Lease) -> bool:
    return lease.boot_id == boot_id() and is_alive(lease.server_pid, lease.server_started)


def end_processes(ended: Iterable[Lease]) -> None:
    """End the server processes of leases of this host, each with its whole session, and see their guardians off.

    A guardian, too, has the lock on its server's GPUs.
    """
    here = [one for one in ended if one.boot_id == boot_id()]
    guardians = [guardian_of(one.server_pid) for one in here]
    for lease in here:
        kill_group(lease.server_pid, lease.server_started)
    wait_until_ended(guardians, GUARDIAN_S)
