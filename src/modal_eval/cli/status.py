"""`modal-eval status`: which servers run, who holds them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from modal_eval import serving
from modal_eval.cli.options import Json
from modal_eval.cli.output import complain, data, print_json, talk
from modal_eval.errors import EXIT_DONE, ServerError
from modal_eval.records import Lease
from modal_eval.results.run_folder import run_facts


def command(*, json: Json = False) -> int:
    """Show the servers that modal-eval started, on this machine and on Modal, and who holds them."""
    found = [describe(lease) for lease in serving.leases()] + [describe_orphan(one) for one in orphans()]
    if json:
        print_json(found)
    elif not found:
        talk.print("No server of ours is running.")
    else:
        table = Table(
            "server", "model", "benchmark", "since", "age", "cost", "holder", "url", "run", box=None, pad_edge=False
        )
        for one in found:
            shown = ("server", "model", "benchmark", "created_at", "age", "cost", "holder", "url", "run_dir")
            table.add_row(*(str(one[key] or "") for key in shown))
        data.print(table)
    return EXIT_DONE


def describe(lease: Lease) -> dict[str, Any]:
    return {
        "lease_id": lease.lease_id,
        "server": lease.app or f"pid {lease.server_pid}",
        "server_pid": lease.server_pid,
        "app": lease.app or None,
        "model": lease.model,
        "benchmark": run_facts(Path(lease.run_dir))["benchmark"] if lease.run_dir else None,
        "url": lease.url,
        "created_at": lease.created_at,
        "age": age(lease.created_at),
        "deadline": lease.deadline,
        "cost": cost(lease),
        "holder": holder(lease),
        "holder_alive": serving.is_live(lease),
        "run_dir": lease.run_dir,
    }


def age(created_at: str) -> str:
    """How long ago, in hours and minutes."""
    if not created_at:
        return ""
    minutes = int((datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds() // 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def cost(lease: Lease) -> float | None:
    """What the server costs since the lease was taken, at most: Modal charges nothing while its GPU is given back."""
    if lease.hour_price is None:
        return None
    held_s = (datetime.now(UTC) - datetime.fromisoformat(lease.created_at)).total_seconds()
    return round(lease.hour_price * held_s / 3600, 2)


def holder(lease: Lease) -> str:
    if not serving.is_live(lease):
        return "dead: `modal-eval stop` ends it"
    if lease.kept:
        return f"kept until {moment(lease.deadline)}"
    return f"pid {lease.holder_pid} on {lease.host}"


def orphans() -> list[serving.Orphan]:
    """The apps on Modal that no lease here speaks of; where Modal cannot be asked, what is known here has to do."""
    if not serving.modal_configured():
        return []
    try:
        return serving.orphans()
    except ServerError as error:
        complain(f"{error}; what follows is what this machine knows")
        return []


def describe_orphan(one: serving.Orphan) -> dict[str, Any]:
    if one.may_stop:
        said = "no lease is left: `modal-eval stop` ends it"
    else:
        said = f"{one.holder} until {moment(one.deadline)}" if one.ours else f"another machine: {one.holder}"
    return {
        "lease_id": None, "server": one.app, "server_pid": None, "app": one.app, "model": one.model, "benchmark": None,
        "url": None, "created_at": one.created_at, "age": age(one.created_at), "deadline": one.deadline, "cost": None, "holder": said,
        "holder_alive": not one.may_stop, "run_dir": None,
    }  # fmt: skip


def moment(when: float | None) -> str:
    """A Unix time as people write it, where they are."""
    return datetime.fromtimestamp(when).astimezone().isoformat(sep=" ", timespec="minutes") if when else "its end"
