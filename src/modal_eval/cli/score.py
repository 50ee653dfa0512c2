"""`modal-eval score`: score a run again from its journal; no server is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from modal_eval.cli.options import HiddenSettings, Json, typed
from modal_eval.cli.output import complain, data, print_json, shown, talk
from modal_eval.errors import EXIT_DONE, EXIT_INCOMPLETE
from modal_eval.reports.tables import footnote, result_table
from modal_eval.results.run_folder import Run, locked
from modal_eval.stages.reporting import report
from modal_eval.stages.rescoring import rescore


def command(
    run: Annotated[Path, Parameter(help="Run folder.")],
    *,
    json: Json = False,
    overrides: HiddenSettings = None,
) -> int:
    """Score a run again from its journal, without any server.

    Takes what changes scores alone: --eval.k, --eval.scoring_workers, --eval.max_unscored, --eval.rollout_timeout, the
    scorer's version (--eval.packages, --eval.environment, --eval.module_paths) and the benchmark's scoring arguments,
    such as --env.extraction=last_number (docs/benchmarks.md lists them). What would change an answer is refused by name.
    The earlier results are kept in the run's folder under scores/.
    """
    run_dir = Run.load(run).run_dir
    with locked(run_dir):
        earlier = rescore(run_dir, typed(overrides))
        summary = report(run_dir)
    if earlier:
        talk.print(f"earlier results: {shown(earlier)}", soft_wrap=True)
    for warning in summary["warnings"]:
        complain(warning)
    if json:
        print_json(summary)
    else:
        data.print(result_table(summary))
        data.print("\n" + footnote(summary), soft_wrap=True)
    return EXIT_DONE if summary["status"] == "complete" else EXIT_INCOMPLETE
