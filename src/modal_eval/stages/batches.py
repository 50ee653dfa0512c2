"""A batch: the same suite for many checkpoints, so many at a time, each in a process of its own.

`outputs/evals/batches/{batch_id}/` holds `batch.json`, a log for each job, and one table over all: `table.md` with a row a
checkpoint, `table.csv` with a row a checkpoint and benchmark.
"""

from __future__ import annotations

import csv
import io
import os
import secrets
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from modal_eval import paths
from modal_eval.config.jobs import Job
from modal_eval.config.models import Overrides
from modal_eval.config.request import SuiteRequest, Where
from modal_eval.config.suites import load_suite, resolve_suite
from modal_eval.errors import EXIT_DONE, EXIT_FAILED, EXIT_INCOMPLETE
from modal_eval.reports.suite_table import CSV_KEYS
from modal_eval.reports.tables import score_text
from modal_eval.results.files import read_json, write_json, write_whole
from modal_eval.stages.children import last_words, run_child
from modal_eval.stages.suites import Outcome, failed, owed

SAID = 300
"""So many characters of a child's last words stand in a row of the table."""


@dataclass(frozen=True)
class Batch:
    """A batch that is being worked on."""

    batch_dir: Path
    suite: str
    jobs: tuple[Job, ...]
    overrides: Overrides
    where: Where
    faults: dict[str, str] = field(default_factory=dict)
    """Why a job's process failed as a whole, by the job's slug."""

    def check(self) -> None:
        """Raise `ConfigError` for a wrong setting of any job."""
        for job in self.jobs:
            resolve_suite(job.checkpoint_path, load_suite(self.suite), self.overrides)

    def open(self) -> None:
        """Check everything, then make the folder."""
        self.check()
        paths.logs_dir(self.batch_dir).mkdir(parents=True, exist_ok=True)
        (self.batch_dir / "jobs").mkdir(parents=True, exist_ok=True)
        write_json(
            self.batch_dir / "batch.json", {"suite": self.suite, "jobs": [job.model_dump() for job in self.jobs]}
        )

    def suite_dir(self, job: Job) -> Path:
        group = f"{load_suite(self.suite).name}--{job.slug}"
        return (paths.output_root() / "suites" / group / f"{self.batch_dir.name}-{job.slug}").absolute()

    def rows(self, job: Job) -> list[Outcome]:
        """How each benchmark of a job ended so far; what its process left open when it failed has failed with it.

        A suite of another checkpoint, which had this name in an earlier list of jobs, says nothing of this one.
        """
        names = [entry.name for entry in load_suite(self.suite).benchmarks]
        path = self.suite_dir(job) / paths.SUITE
        suite = read_json(path) if path.is_file() else {}
        held = suite["outcomes"] if suite.get("model") == job.checkpoint_path else {}
        fault = self.faults.get(job.slug)
        return [held.get(name) or (failed(name, fault) if fault else owed(name)) for name in names]

    def work_off(self, at_once: int, benchmarks_at_once: int, variables: dict[str, str]) -> Generator[Job]:
        """Run every job, so many at a time, and yield each as it ends. Closing it stops those that run."""
        stopping = threading.Event()
        with ThreadPoolExecutor(at_once) as threads:
            started = {
                threads.submit(self._run, job, benchmarks_at_once, variables, stopping): job for job in self.jobs
            }
            try:
                for future in as_completed(started):
                    future.result()
                    self.write_tables()
                    yield started[future]
            finally:
                stopping.set()

    def _run(self, job: Job, at_once: int, variables: dict[str, str], stopping: threading.Event) -> None:
        if stopping.is_set():
            return
        folder = self.batch_dir / "jobs"
        request = SuiteRequest(
            model=job.checkpoint_path,
            suite=self.suite,
            overrides=self.overrides,
            where=self.where,
            suite_dir=self.suite_dir(job),
        )
        write_whole(folder / f"{job.slug}.json", [request.model_dump_json().encode()])
        words = ["suite", str(folder / f"{job.slug}.json"), str(at_once)]
        log = folder / f"{job.slug}.log"
        begins_at = log.stat().st_size if log.is_file() else 0
        code = run_child(words, log, {**os.environ, **variables}, stopping)
        if code in (None, EXIT_DONE, EXIT_INCOMPLETE):
            return
        # 1 is the code of a suite some of whose benchmarks failed, which its rows tell, and of most faults that end it early
        if code != EXIT_FAILED or any(row["status"] == "owed" for row in self.rows(job)):
            said = " ".join(last_words(log, begins_at).split())
            self.faults[job.slug] = f"exit {code}, see {log}: {said[-SAID:]}"

    def write_tables(self) -> None:
        write_whole(self.batch_dir / "table.md", [self.markdown().encode()])
        write_whole(self.batch_dir / "table.csv", [self.csv().encode()])

    def markdown(self) -> str:
        """A row a checkpoint, a column a benchmark."""
        names = [entry.name for entry in load_suite(self.suite).benchmarks]
        lines = [f"| checkpoint | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
        lines += [f"| {job.output_name} | {' | '.join(map(cell, self.rows(job)))} |" for job in self.jobs]
        if faults := [(job.output_name, self.faults[job.slug]) for job in self.jobs if job.slug in self.faults]:
            lines += ["", *(f"* **{name}**: {fault}" for name, fault in faults)]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """A row a checkpoint and benchmark, with full precision."""
        written = io.StringIO()
        writer = csv.DictWriter(written, ("checkpoint", *CSV_KEYS), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for job in self.jobs:
            writer.writerows(
                {"checkpoint": job.output_name, **row, **(row.get("interval") or {})} for row in self.rows(job)
            )
        return written.getvalue()


def cell(row: Outcome) -> str:
    """A score with its standard error; what is no score yet says so."""
    if row.get("avg_reward") is None:
        return str(row["status"])
    score = score_text(row["avg_reward"], row.get("stderr"))
    return score if row["status"] == "complete" else f"{score} ({row['status']})"


def batch_folder() -> Path:
    return paths.output_root() / "batches" / secrets.token_hex(4)
