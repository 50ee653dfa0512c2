"""`modal-eval stop`: end what a dead run left behind."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from modal_eval import serving
from modal_eval.cli.options import Json
from modal_eval.cli.output import print_json, talk
from modal_eval.cli.status import describe
from modal_eval.errors import EXIT_DONE


def command(
    *,
    model: Annotated[
        str | None, Parameter(name=["-m", "--model"], help="The servers of this model, live ones too.")
    ] = None,
    benchmark: Annotated[
        str | None, Parameter(name=["-b", "--benchmark"], help="The servers of runs of this benchmark, live ones too.")
    ] = None,
    all: Annotated[bool, Parameter(name="--all", help="Also servers whose run is still alive.")] = False,  # noqa: A002
    json: Json = False,
) -> int:
    """Stop servers by their lease: those of dead runs, those of a model or a benchmark that is named, or all."""
    named = model is not None or benchmark is not None
    stopped = []
    for lease in serving.leases():
        one = describe(lease)
        if one["holder_alive"] and not (all or named):
            continue
        if model not in (None, one["model"]) or benchmark not in (None, one["benchmark"]):
            continue
        serving.stop_lease(lease)
        stopped.append(one)
    if json:
        print_json(stopped)
    elif not stopped:
        talk.print("Nothing to stop: no server of a dead run is left. `modal-eval stop --all` also ends live ones.")
    for one in stopped:
        talk.print(f"Stopped server {one['server_pid']} ({one['model']}) of {one['run_dir']}", soft_wrap=True)
    return EXIT_DONE
