"""Report, as Prefect sees it: the numbers, and the artifact that the UI shows."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from modal_eval.reports.tables import markdown_report
from modal_eval.stages import reporting


@task(name="report", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def report(run_dir: Path) -> dict[str, Any]:
    summary = reporting.report(run_dir)
    create_markdown_artifact(markdown_report(summary), key=artifact_key(summary), description=summary["model"])
    return summary


def artifact_key(summary: dict[str, Any]) -> str:
    """One timeline of reports per benchmark in the UI."""
    return "report-" + "".join(c if c.isalnum() else "-" for c in summary["benchmark"].lower())
