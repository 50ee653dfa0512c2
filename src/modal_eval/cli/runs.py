"""`modal-eval runs`: what was evaluated, newest first."""

from __future__ import annotations

from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from modal_eval import paths
from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json, shown, talk
from modal_eval.errors import EXIT_DONE
from modal_eval.reports.tables import score_text
from modal_eval.results.run_folder import find_runs, is_asked_for, run_facts


def command(
    *,
    benchmark: Annotated[str | None, Parameter(name=["-b", "--benchmark"], help="Only runs of this benchmark.")] = None,
    model: Annotated[str | None, Parameter(name=["-m", "--model"], help="Only runs of this model.")] = None,
    limit: Annotated[int, Parameter(name=["-l", "--limit"], help="At most this many.")] = 10,
    json: Json = False,
) -> int:
    """List recent runs."""
    facts = (run_facts(run_dir) for run_dir in find_runs())
    found = [one for one in facts if is_asked_for(one, model, benchmark)][:limit]
    if json:
        print_json(found)
    elif found:
        data.print(_table(found))
    else:
        talk.print(f"No runs below {paths.output_root()} yet. Start one: modal-eval run -m MODEL -b BENCHMARK")
    return EXIT_DONE


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table("started", "benchmark", "model", "score", "rollouts", "status", "folder", box=None, pad_edge=False)
    for one in found:
        table.add_row(
            str(one["started_at"])[:16].replace("T", " "),
            str(one["benchmark"]),
            str(one["model"]),
            score_text(one["avg_reward"], one["stderr"]),
            f"{one['finished_rollouts']}/{one['total_rollouts'] or '?'}",
            str(one["status"]),
            shown(one["run_dir"]),
        )
    return table
