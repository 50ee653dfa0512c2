"""`modal-eval status`: which servers run, who holds them, until when, and what they cost."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from modal_eval import serving
from modal_eval.cli.options import Json
from modal_eval.cli.output import complain, data, print_json, talk
from modal_eval.errors import EXIT_DONE, ServerError
from modal_eval.records import Lease
from modal_eval.results.run_folder import run_facts
from modal_eval.serving import Server

SHOWN = ("server", "where", "model", "benchmark", "age", "holder", "until", "cost_so_far", "url", "run_dir")


def command(*, json: Json = False) -> int:
    """Show the servers that modal-eval started, on this machine and on Modal: who holds each, until when, and what it
    has cost so far at most.

    The cost is by `infra.gpu_hour_price` where a run gave it, else for Modal's GPUs an estimate by their list prices, which
    MODAL_EVAL_GPU_PRICES corrects (`H100=0.0011`, dollars a second); of one's own GPUs the hours are counted.
    """
    found = [describe(server) for server in serving.servers(found_on_modal())]
    if json:
        print_json(found)
    elif not found:
        talk.print("No server of ours is running.")
    else:
        table = Table(box=None, pad_edge=False)
        for name in SHOWN:  # folded, not cut: names, addresses and folders are there to be copied
            table.add_column(name.removesuffix("_dir").replace("_", " "), overflow="fold")
        for one in found:
            table.add_row(*(str(one[key] or "") for key in SHOWN))
        data.print(table)
        if not all(one["holder_alive"] for one in found):
            talk.print("`modal-eval stop` ends what nobody holds.")
    return EXIT_DONE


def describe(server: Server) -> dict[str, Any]:
    """One row; the table shows some of it, JSON all."""
    benchmarks = {found for one in server.leases if (found := benchmark_of(one))}
    if server.orphan and server.orphan.benchmark:
        benchmarks.add(server.orphan.benchmark)
    return {
        "server": server.name,
        "where": server.where,
        "pids": list(server.pids),
        "app": server.app if server.on_modal else None,
        "model": server.model,
        "benchmark": ", ".join(sorted(benchmarks)) or None,
        "url": server.url or None,
        "created_at": server.created_at,
        "age": age(server),
        "age_s": round(server.age_s),
        "deadline": server.deadline,
        "until": until(server),
        "gpus": server.price.gpus,
        "gpu": server.price.gpu or None,
        "gpu_hours": round(server.gpu_hours, 2),
        "cost": None if server.cost is None else round(server.cost, 2),
        "cost_is_estimate": server.price.is_estimate,
        "cost_so_far": cost_so_far(server),
        "holder": holders(server),
        "holder_alive": server.live,
        "run_dir": ", ".join(server.run_dirs) or None,
    }


def age(server: Server) -> str:
    """How long it is there, in hours and minutes."""
    if not server.created_at:
        return ""
    minutes = int(server.age_s // 60)
    return f"{minutes // 60}:{minutes % 60:02}"


def until(server: Server) -> str:
    return moment(server.deadline) if server.deadline else "its run ends"


def cost_so_far(server: Server) -> str:
    """Money where a price is known, else the hours of GPUs; Modal charges for less when its GPU was given back."""
    if server.cost is None:
        return f"{server.gpu_hours:.2f} GPU-hours" if server.price.gpus else ""
    at_most = "at most " if server.on_modal else ""
    return f"{at_most}${server.cost:.2f}{' (estimate)' if server.price.is_estimate else ''}"


def holders(server: Server) -> str:
    """Who has a right to it."""
    if not server.live:
        return f"nobody: {server.why_not_live}"
    if orphan := server.orphan:
        return orphan.holder if orphan.ours else f"another machine: {orphan.holder}"
    live = [one for one in server.leases if serving.is_live(one)] or server.leases
    return ", ".join(dict.fromkeys(map(holder, live)))


def benchmark_of(lease: Lease) -> str | None:
    """The benchmark of the lease's run, or whose settings a server without a run has."""
    return run_facts(Path(lease.run_dir))["benchmark"] if lease.run_dir else lease.benchmark or None


def holder(lease: Lease) -> str:
    return "kept" if lease.kept else f"pid {lease.holder_pid} on {lease.host}"


def found_on_modal() -> list[serving.Orphan]:
    """The apps on Modal that no lease here speaks of; where Modal cannot be asked, what is known here has to do."""
    if not serving.modal_configured():
        return []
    try:
        return serving.orphans()
    except ServerError as error:
        complain(f"{error}; what follows is what this machine knows")
        return []


def moment(when: float) -> str:
    """A Unix time as people write it, where they are."""
    return datetime.fromtimestamp(when).astimezone().isoformat(sep=" ", timespec="minutes")
