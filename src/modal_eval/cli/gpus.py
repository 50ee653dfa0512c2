"""`modal-eval gpus`: which GPUs this machine has, who holds them, and what was left behind on them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from modal_eval import gpus
from modal_eval.cli.live import duration
from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json, talk
from modal_eval.cli.status import moment
from modal_eval.errors import EXIT_DONE
from modal_eval.gpus import Gpu, GpuProcess, Survey

NONE = (
    "This machine has no NVIDIA GPU. Without one, a GGUF model runs in llama.cpp, --infra.target=modal rents a GPU, and "
    "--infra.base_url uses a server that is there."
)


def command(
    *,
    reap: Annotated[
        bool,
        Parameter(
            name="--reap",
            help="End this user's idle leftovers of other programs too: adopted processes whose GPU does nothing.",
        ),
    ] = False,
    history: Annotated[
        int | None,
        Parameter(name="--history", help="Show the last N leases instead: who, how long waited, how long held."),
    ] = None,
    json: Json = False,
) -> int:
    """Show this machine's GPUs, who holds or uses each, and who waits; end what dead runs of ours left on them."""
    if history is not None:
        return show_history(history, as_json=json)
    found = gpus.survey(reap=reap)
    if json:
        print_json([describe(found, gpu) for gpu in found.gpus])
    elif not found.gpus:
        talk.print(NONE)
    else:
        data.print(table(found))
    for waiter in found.waiting:
        talk.print(f"Waiting for {waiter.request.count}: {waiter.holder}", soft_wrap=True)
    if found.ended:
        talk.print(f"Ended leftovers: pid {', '.join(map(str, sorted(found.ended)))}", soft_wrap=True)
    if found.zombies:
        pids = ", ".join(map(str, sorted(found.zombies)))
        talk.print(f"Leftovers of other programs: pid {pids}; `modal-eval gpus --reap` ends them", soft_wrap=True)
    return EXIT_DONE


def show_history(count: int, *, as_json: bool) -> int:
    """The last leases, and how busy the GPUs were in the time that is remembered."""
    events = gpus.history.read(gpus.Folder())
    told, indices = gpus.history.leases(events)[-count:] if count > 0 else [], [gpu.index for gpu in gpus.inventory()]
    used = gpus.history.usage(events, indices, time.time())
    if as_json:
        print_json({"leases": [asdict(one) for one in told], "usage": asdict(used)})
        return EXIT_DONE
    shown = Table("since", "gpus", "waited", "held", "run", box=None, pad_edge=False)
    for one in told:
        held = "still" if one.until is None else duration(one.until - one.since)
        shown.add_row(moment(one.since), ", ".join(map(str, one.gpus)), duration(one.waited_s), held, one.run)
    data.print(shown)
    if used.all_s:
        talk.print(
            f"In {duration(used.all_s / len(indices))} the GPUs were leased {used.leased_s / used.all_s:.0%} of the time, and "
            f"{used.wanted_idle_s / used.all_s:.1%} of it one was free for somebody who waited.",
            soft_wrap=True,
        )
    return EXIT_DONE


def table(found: Survey) -> Table:
    shown = Table("gpu", "name", "memory", "use", "state", "held or used by", box=None, pad_edge=False)
    for gpu in found.gpus:
        shown.add_row(
            str(gpu.index),
            gpu.name,
            f"{mib(gpu.used_mib)}/{mib(gpu.total_mib)} MiB",
            "?" if gpu.utilization is None else f"{gpu.utilization}%",
            found.state(gpu) + ("" if gpu in found.visible else ", hidden by CUDA_VISIBLE_DEVICES"),
            people(found, gpu),
        )
    return shown


def people(found: Survey, gpu: Gpu) -> str:
    if gpu.uuid in found.holders:
        return str(found.holders[gpu.uuid] or "somebody who is taking it just now")
    return "; ".join(f"{one.user or 'unknown'}, pid {one.pid}: {one.name}" for one in gpu.processes)


def mib(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def describe(found: Survey, gpu: Gpu) -> dict[str, Any]:
    holder = found.holders.get(gpu.uuid)
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "total_mib": gpu.total_mib,
        "used_mib": gpu.used_mib,
        "utilization": gpu.utilization,
        "state": found.state(gpu),
        "visible": gpu in found.visible,
        "holder": {**asdict(holder), "alive": holder.alive} if holder else None,
        "processes": [process(found, one) for one in gpu.processes],
    }


def process(found: Survey, one: GpuProcess) -> dict[str, Any]:
    return {**asdict(one), "zombie": one.pid in found.zombies}
