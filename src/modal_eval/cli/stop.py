"""`modal-eval stop`: end what a dead run left behind."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from modal_eval import serving
from modal_eval.cli.options import Json
from modal_eval.cli.output import complain, print_json, talk
from modal_eval.cli.status import describe, describe_orphan, orphans
from modal_eval.errors import EXIT_DONE, EXIT_FAILED, ServerError


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
    """Stop servers, here and on Modal: those of dead runs, those of a model or a benchmark that is named, or all.

    An app on Modal that another machine deployed is stopped once its deadline has passed, and no sooner.
    """
    named = model is not None or benchmark is not None
    stopped, faults = [], []
    for lease in serving.leases():
        one = describe(lease)
        if one["holder_alive"] and not (all or named):
            continue
        if model not in (None, one["model"]) or benchmark not in (None, one["benchmark"]):
            continue
        try:
            serving.stop_lease(lease)
        except ServerError as error:  # the others are to be stopped all the same
            faults.append(str(error))
            continue
        stopped.append(one)
    for orphan in [] if benchmark or faults else orphans():
        wanted = orphan.ours and orphan.serves(model) if model else orphan.may_stop or (all and orphan.ours)
        if wanted:
            serving.stop_orphan(orphan)
            stopped.append(describe_orphan(orphan))
    if json:
        print_json(stopped)
    elif not (stopped or faults):
        talk.print("Nothing to stop: no server of a dead run is left. `modal-eval stop --all` also ends live ones.")
    for one in stopped:
        whose = f" ({one['model']}) of {one['run_dir']}" if one["run_dir"] else ""
        talk.print(f"Stopped server {one['server_pid'] or one['server']}{whose}", soft_wrap=True)
    for fault in faults:
        complain(fault)
    return EXIT_FAILED if faults else EXIT_DONE
