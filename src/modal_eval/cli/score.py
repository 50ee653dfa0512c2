"""`modal-eval score`: score a run again from its journal; no server is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json
from modal_eval.errors import EXIT_DONE, EXIT_INCOMPLETE
from modal_eval.reports.tables import footnote, result_table
from modal_eval.results.run_folder import Run, locked
from modal_eval.stages.reporting import report
from modal_eval.stages.scoring import rescore


def command(
    run: Annotated[Path, Parameter(help="Run folder.")],
    *,
    json: Json = False,
) -> int:
    """Score a run again from its journal, without any server."""
    run_dir = Run.load(run).run_dir
    with locked(run_dir):
        rescore(run_dir)
        summary = report(run_dir)
    if json:
        print_json(summary)
    else:
        data.print(result_table(summary))
        data.print("\n" + footnote(summary), soft_wrap=True)
    return EXIT_DONE if summary["status"] == "complete" else EXIT_INCOMPLETE
