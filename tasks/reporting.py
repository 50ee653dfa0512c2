"""Report, as Prefect sees it: the numbers, and the artifacts that the UI shows."""

import socket
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from modal_eval.reports.tables import markdown_report, score_lines
from modal_eval.results.progress import note_stage
from modal_eval.stages import reporting
from modal_eval.stages.suites import outcome_of
from tasks.artifacts import key_of, logs_of, publish


@task(name="report", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def report(run_dir: Path) -> dict[str, Any]:
    summary = reporting.report(run_dir)
    note_stage(run_dir, "report")  # who watches sees what is waited for while the Prefect server is away
    benchmark, model = summary["benchmark"], summary["model"]
    rows = [
        {"metric": name.strip(), "score ± stderr": score, "n": count} for name, score, count in score_lines(summary)
    ]
    outcome = {**outcome_of(summary, run_dir), "host": socket.gethostname()}
    publish("table", key_of("result", benchmark), rows, f"{model} · {summary['status']}", outcome)
    text = "\n\n".join([markdown_report(summary), where(run_dir, summary)])
    publish("markdown", key_of("report", benchmark), text, model)
    return summary


def where(run_dir: Path, summary: dict[str, Any]) -> str:
    """Where everything is that a reader of the report may want to look at next."""
    server = summary.get("server") or {}
    lines = [
        "### Where it is",
        "",
        f"* files: `{run_dir}` on {socket.gethostname()}",
        f"* server: {server.get('engine', 'none was needed')}",
        *(f"* log: `{path}`" for path in logs_of(run_dir)),
    ]
    lines += ["", f"`modal-eval score {run_dir}` scores it again without a server."]
    return "\n".join(lines)
