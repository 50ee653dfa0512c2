"""`checkpoint_meta.json`: how far a run is, for resume, for the live view, and for whoever looks into the folder."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modal_eval import paths
from modal_eval.metrics import clustered_standard_error, mean
from modal_eval.records import Row
from modal_eval.results.files import read_json, write_json
from modal_eval.results.rows import is_generated, is_scored, row_key
from modal_eval.results.run_folder import Run, now

CHECKPOINT_VERSION = "1.0"
WRITE_INTERVAL_S = 0.5


class Progress:
    """Counts finished rollouts and writes `checkpoint_meta.json`, at most twice a second."""

    def __init__(self, run: Run, total_examples: int, *, stage: str = "generate") -> None:
        self._run = run
        self._stage = stage
        self._path = run.run_dir / paths.CHECKPOINT_META
        self._total_examples = total_examples
        self._rollouts = run.config.eval.rollouts
        self._rewards: dict[int, dict[int, float | None]] = defaultdict(dict)
        self._finished: dict[int, set[int]] = defaultdict(set)
        self._began = time.monotonic()
        self._finished_at_start = 0
        self._written = 0.0
        self._unwritten = 0
        before = read_json(self._path) if self._path.is_file() else {}
        self._start_time = before.get("start_time") or now()
        self._metrics: dict[str, Any] = before.get("calls") or {}

    @property
    def total_rollouts(self) -> int:
        return self._total_examples * self._rollouts

    @property
    def finished_rollouts(self) -> int:
        """Rollouts that are scored, or have nothing but their scoring to come; any other is owed again on resume."""
        return sum(map(len, self._finished.values()))

    def add_known(self, rows: list[Row]) -> None:
        """Count the rows of an earlier attempt, which say nothing about this attempt's speed."""
        for row in rows:
            self._count(row)
        self._finished_at_start = self.finished_rollouts

    def add(self, row: Row, proxy_stats: dict[str, Any]) -> None:
        self._count(row)
        self._unwritten += 1
        self.report(proxy_stats, force=self._unwritten >= self._run.config.eval.checkpoint_every)

    def _count(self, row: Row) -> None:
        example_id, rollout = row_key(row)
        self._rewards[example_id][rollout] = float(row["reward"]) if is_scored(row) else None
        (self._finished[example_id].add if is_generated(row) else self._finished[example_id].discard)(rollout)

    def report(self, proxy_stats: dict[str, Any], *, force: bool = True) -> None:
        """Write the file unless it was written a moment ago. Scoring repeats the calls: those of generating are shown."""
        if self._stage == "generate":
            self._metrics = proxy_stats
        if force and time.monotonic() - self._written >= WRITE_INTERVAL_S:
            self.write()

    def write(self, stage: str | None = None) -> None:
        self._written = time.monotonic()
        self._unwritten = 0
        write_json(self._path, self.describe(stage or self._stage))

    def describe(self, stage: str) -> dict[str, Any]:
        scored = [[r for r in rewards.values() if r is not None] for rewards in self._rewards.values()]
        values = [reward for cluster in scored for reward in cluster]
        finished = self.finished_rollouts
        elapsed = time.monotonic() - self._began
        speed = (finished - self._finished_at_start) / elapsed if elapsed > 0 else 0.0
        return {
            "checkpoint_version": CHECKPOINT_VERSION,
            "run_id": self._run.run_id,
            "env_id": self._run.config.env_id,
            "model": self._run.config.model,
            "rollouts_per_example": self._rollouts,
            "completed_example_ids": sorted(
                example_id
                for example_id, finished_here in self._finished.items()
                if len(finished_here) >= self._rollouts
            ),
            "total_examples": self._total_examples,
            "total_rollouts": self.total_rollouts,
            "completed_rollouts": finished,
            "unscored_rollouts": sum(map(len, self._rewards.values())) - finished,
            "start_time": self._start_time,
            "last_checkpoint_time": now(),
            "stage": stage,
            "stage_seconds": stage_seconds(self._path),
            "avg_reward": mean(values) if values else None,
            "stderr": clustered_standard_error(scored),
            "seconds_left": (self.total_rollouts - finished) / speed if speed > 0 else None,
            "calls": self._metrics,
        }


def percent_done(run_dir: Path) -> float:
    """Share of a run's rollouts that are generated, 0 to 100 with one decimal; 0 before anything is known."""
    path = run_dir / paths.CHECKPOINT_META
    meta = read_json(path) if path.is_file() else {}
    total = meta.get("total_rollouts") or 0
    return round(100.0 * meta.get("completed_rollouts", 0) / total, 1) if total else 0.0


def stage_seconds(path: Path) -> dict[str, float]:
    """How long each stage took so far; other stages write it while a `Progress` lives."""
    found: dict[str, float] = read_json(path).get("stage_seconds", {}) if path.is_file() else {}
    return found


@contextmanager
def timed(run_dir: Path, stage: str) -> Iterator[None]:
    """Record that `stage` goes on and, at its end, how long it took, added up over attempts."""
    note_stage(run_dir, stage)
    began = time.monotonic()
    try:
        yield
    finally:
        note_stage(run_dir, stage, seconds=time.monotonic() - began)


def note_stage(run_dir: Path, stage: str, *, seconds: float | None = None, note: str = "") -> None:
    """Record that `stage` goes on, or how long it took, without touching the counts.

    `note` says what it is at, such as who holds the GPUs that it waits for; it is forgotten with the next word.
    """
    path = run_dir / paths.CHECKPOINT_META
    meta: dict[str, Any] = (
        read_json(path) if path.is_file() else {"checkpoint_version": CHECKPOINT_VERSION, "run_id": run_dir.name}
    )
    if seconds is None:
        meta["stage"] = stage
    else:
        spent = meta.setdefault("stage_seconds", {})
        spent[stage] = round(spent.get(stage, 0.0) + seconds, 3)
    meta.pop("note", None)
    if note:
        meta["note"] = note
    write_json(path, meta)
