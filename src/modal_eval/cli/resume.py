"""`modal-eval resume`: pay only for what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from modal_eval.cli.evaluating import evaluate
from modal_eval.cli.options import Json, PushToHub, Settings, typed
from modal_eval.config.request import RunRequest
from modal_eval.results.run_folder import Run, latest_incomplete


def command(
    run: Annotated[Path | None, Parameter(help="Run folder; left out, the newest incomplete run is taken.")] = None,
    *,
    model: Annotated[str | None, Parameter(name=["-m", "--model"], help="Only runs of this model.")] = None,
    benchmark: Annotated[str | None, Parameter(name=["-b", "--benchmark"], help="Only runs of this benchmark.")] = None,
    push_to_hub: PushToHub = None,
    json: Json = False,
    overrides: Settings = None,
) -> int:
    """Finish an interrupted run.

    Finished calls are answered from the journal. Settings that change no answer (concurrency, limits, more examples)
    may be given; any other difference is refused by name.
    """
    run_dir = Run.load(run).run_dir if run else latest_incomplete(model, benchmark)
    request = RunRequest(
        model=model if run else None, run_dir=run_dir, overrides=typed(overrides), push_to_hub=push_to_hub
    )
    return evaluate(request, as_json=json)
