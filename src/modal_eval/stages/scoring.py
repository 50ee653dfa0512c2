"""Score: no server is held any more. What is pending or could not be scored is scored from the journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from modal_eval import paths
from modal_eval.harnesses.job import HarnessStart
from modal_eval.proxy import Proxy
from modal_eval.records import Row
from modal_eval.results.progress import timed
from modal_eval.results.rows import Key, is_scored, rewrite_in_order
from modal_eval.results.run_folder import Run
from modal_eval.stages.generating import finish_from_journal, known_rows, owed_and_answered, replay
from modal_eval.stages.serving import start_proxy, teardown

Result = TypeVar("Result")


def score(run_dir: Path) -> int:
    """Put `results.jsonl` in order, one row a rollout, after scoring what is pending and what only scoring spoiled.

    Returns the number of rows.
    """
    with timed(run_dir, "score"):
        rows = known_rows(run_dir)
        if any(_owes_scoring(row) for row in rows.values()):
            again = replay_from_journal(run_dir, {key: row for key, row in rows.items() if is_scored(row)})
            rows |= {key: row for key, row in again.items() if _owes_scoring(rows.get(key, {}))}
        rewrite_in_order(run_dir / paths.RESULTS, rows.values())
    return len(rows)


def _owes_scoring(row: Row) -> bool:
    if not row or is_scored(row):
        return False
    return bool(row.get("pending")) or (row.get("error") or {}).get("fault") == "scoring"


def replay_from_journal(
    run_dir: Path,
    done: dict[Key, Row],
    *,
    run: Run | None = None,
    on_start: Callable[[HarnessStart], None] | None = None,
) -> dict[Key, Row]:
    """The row of every rollout that is not `done`, made again from the journal without a server."""
    return _with_replaying_proxy(run_dir, lambda folder, proxy: replay(folder, proxy, done, run=run, on_start=on_start))


def finish_without_server(run_dir: Path) -> int:
    """Finish what a killed run had already generated but not written down; returns how many rollouts."""
    if not owed_and_answered(run_dir):
        return 0
    with timed(run_dir, "replay"):
        return _with_replaying_proxy(run_dir, finish_from_journal)


def _with_replaying_proxy(run_dir: Path, work: Callable[[Path, Proxy], Result]) -> Result:
    proxy = start_proxy(run_dir, server=None)
    try:
        return work(run_dir, proxy)
    finally:
        teardown(run_dir)
