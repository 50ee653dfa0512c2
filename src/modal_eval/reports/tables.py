"""A run's result as a person reads it: on the terminal and in the Prefect UI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text


def score_text(value: float | None, stderr: float | None) -> str:
    """`0.512 ± 0.021`: a mean and its standard error; `–` where there is nothing to show."""
    if value is None:
        return "–"
    return f"{value:.3f}" if stderr is None else f"{value:.3f} ± {stderr:.3f}"


def score_lines(summary: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, score with its standard error, number of rollouts it stands on), the overall reward first."""
    yield "reward", score_text(summary["avg_reward"], summary["stderr"]), str(summary["num_scored"])
    if bounds := summary.get("interval"):
        yield "  95% interval", f"{bounds['low']:.3f} – {bounds['high']:.3f}", str(summary["num_scored"])
    for task, one in summary["by_task"].items():
        yield f"  {task}", score_text(one["avg_reward"], one["stderr"]), str(one["num_scored"])
    drawn_from = str(summary.get("k_examples", 0) * summary["rollouts_per_example"])
    for key in ("pass_at_k", "pass_hat_k", "maj_at_k", "metrics_pass_at_k"):
        for name, value in summary.get(key, {}).items():
            yield name, score_text(value, summary.get("k_stderr", {}).get(name)), drawn_from
    for name, value in summary["avg_metrics"].items():
        if name not in summary["by_task"]:
            yield name, score_text(value, summary["metrics_stderr"].get(name)), str(summary["metrics_n"].get(name, 0))


def footnote(summary: dict[str, Any]) -> str:
    """What the score stands on, in one line."""
    tokens = summary.get("tokens") or {}
    parts = [
        f"{summary['num_scored']} of {summary['num_rollouts']} rollouts scored",
        f"{summary['num_unscored']} unscored",
        f"{summary['num_truncated']} truncated",
        f"{summary['num_empty']} empty",
        f"{tokens.get('completion', 0):,} tokens generated",
        f"{(summary.get('time_ms') or 0) / 1000:.0f} s",
    ]
    return " · ".join(parts)


def result_table(summary: dict[str, Any]) -> Table:
    state = "" if summary["status"] == "complete" else "  INCOMPLETE"
    table = Table(
        "", "score ± stderr", Column("n", justify="right"),
        title=Text.assemble(f"\n{summary['model']} on {summary['benchmark']}", (state, "red")), title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for name, score, count in score_lines(summary):
        table.add_row(Text(name), score, count)  # a kind is called what its environment calls it, brackets and all
    return table


def markdown_report(summary: dict[str, Any]) -> str:
    lines = [f"## {summary['model']} on {summary['benchmark']}", ""]
    if summary["status"] != "complete":
        lines += ["**Incomplete: this is no score yet.**", ""]
    lines += ["| | score ± stderr | n |", "|---|---|---|"]
    lines += [f"| {name.strip()} | {score} | {count} |" for name, score, count in score_lines(summary)]
    lines += ["", footnote(summary), ""]
    lines += [f"* {warning}" for warning in summary["warnings"]]
    lines += [
        "",
        f"run `{summary['run_id']}` · {named(summary['harness'])} · model revision `{summary['model_revision']}`",
    ]
    return "\n".join(lines)


def named(harness: dict[str, Any]) -> str:
    """A harness with its version."""
    return f"{harness.get('name', 'harness')} {harness.get('version') or ''}".strip()
