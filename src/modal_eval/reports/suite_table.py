"""The table of a suite: one row a benchmark, on the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from modal_eval.reports.tables import score_text

CSV_KEYS = (
    "benchmark", "status", "avg_reward", "stderr", "low", "high", "num_scored", "num_unscored", "num_truncated", "run_id",
    "run_dir", "error",
)  # fmt: skip
STYLES = {"complete": "green", "incomplete": "yellow", "failed": "red", "owed": "dim"}
HEAD = ("benchmark", "score ± stderr", "95% interval", "n", "unscored", "status")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts of one row, under `HEAD`."""
    bounds = row.get("interval")
    return (
        str(row["benchmark"]),
        score_text(row.get("avg_reward"), row.get("stderr")),
        f"{bounds['low']:.3f} – {bounds['high']:.3f}" if bounds else "",
        str(row.get("num_scored", "")),
        str(row.get("num_unscored", "")),
        str(row["status"]),
    )


def suite_table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    right = [Column(name, justify="right" if name in ("n", "unscored") else "left") for name in HEAD]
    table = Table(
        *right, title=Text(f"\n{facts['model']} on {facts['suite']}", "bold"), title_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
    )  # fmt: skip
    for row in rows:
        *texts, status = cells(row)
        table.add_row(*map(Text, texts), Text(status, STYLES.get(status, "")))
    return table


def markdown_table(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The table with a line below it for each benchmark that failed."""
    lines = [f"## {facts['model']} on {facts['suite']}", "", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in cells(row)) + " |" for row in rows]
    if faults := [f"* **{row['benchmark']}**: {row['error']}" for row in rows if row.get("error")]:
        lines += ["", *faults]
    return "\n".join(lines) + "\n"


def csv_table(rows: list[dict[str, Any]]) -> str:
    """One line a benchmark with full precision; an empty cell is a number that does not exist."""
    written = io.StringIO()
    writer = csv.DictWriter(written, CSV_KEYS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **(row.get("interval") or {})} for row in rows)
    return written.getvalue()
