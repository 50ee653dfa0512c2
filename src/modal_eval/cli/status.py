"""`modal-eval status`: which servers run, who holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from modal_eval import serving
from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json, talk
from modal_eval.errors import EXIT_DONE
from modal_eval.records import Lease
from modal_eval.results.run_folder import run_facts


def command(*, json: Json = False) -> int:
    """Show the servers that modal-eval started on this machine and who holds them."""
    found = [describe(lease) for lease in serving.leases()]
    if json:
        print_json(found)
    elif not found:
        talk.print("No server of ours is running on this machine.")
    else:
        table = Table("server", "model", "benchmark", "since", "holder", "url", "run", box=None, pad_edge=False)
        for one in found:
            shown = ("server_pid", "model", "benchmark", "created_at", "holder", "url", "run_dir")
            table.add_row(*(str(one[key]) for key in shown))
        data.print(table)
    return EXIT_DONE


def describe(lease: Lease) -> dict[str, Any]:
    alive = serving.holder_alive(lease)
    return {
        "lease_id": lease.lease_id,
        "server_pid": lease.server_pid,
        "model": lease.model,
        "benchmark": run_facts(Path(lease.run_dir))["benchmark"],
        "url": lease.url,
        "created_at": lease.created_at,
        "holder": f"pid {lease.holder_pid} on {lease.host}" if alive else "dead: `modal-eval stop` ends it",
        "holder_alive": alive,
        "run_dir": lease.run_dir,
    }
