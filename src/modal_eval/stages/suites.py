"""A suite's folder: which runs belong to it, how each ended, and the table over all of them.

`outputs/evals/suites/{suite}--{model}/{suite_id}/` holds `suite.json`, written before anything starts and after each
benchmark, and the same table as `table.md` and `table.csv`. The runs stand where all runs stand.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from modal_eval import paths, serving
from modal_eval.compare.baselines import save_baseline
from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import Overrides, RunConfig
from modal_eval.config.request import RunRequest, SuiteRequest
from modal_eval.config.suites import load_suite, resolve_suite, serving_key, settings_of
from modal_eval.errors import EXIT_DONE, EXIT_INCOMPLETE, ConfigError, IdentityError, ModalEvalError, SuiteError
from modal_eval.reports.suite_table import csv_table, markdown_table
from modal_eval.results.files import read_json, write_json, write_whole
from modal_eval.results.run_folder import folder_called, model_slug, now
from modal_eval.stages.children import last_words, run_child

logger = logging.getLogger(__name__)

KEEP_S = 180
"""For so long a server that other benchmarks of the suite need waits for the next of them."""

Outcome = dict[str, Any]
"""How one benchmark ended: a row of the table."""


@dataclass(frozen=True)
class Entry:
    """One benchmark of a suite, as it is run."""

    benchmark: str
    """Its name, or the path of its YAML file."""
    name: str
    run_id: str
    """Of its run, so that whoever takes it up again finds its folder."""
    overrides: Overrides
    server: str
    """Benchmarks with the same key may share a server."""
    one_at_a_time: bool
    """Its server takes this machine as it is: two of them would be in each other's way."""
    on_modal: bool = False
    """Nothing but Modal can serve it from here."""
    overflow_s: float | None = None
    """With `infra.target=auto`: after so long without a worker's slot on a node it goes to Modal."""


@dataclass(frozen=True)
class Suite:
    """A suite that is being worked on."""

    suite_dir: Path
    name: str
    model: str
    stage: str
    entries: tuple[Entry, ...]
    queue: str | None = None
    """Queue of its runs in their pools; `None` for that of each deployment."""
    modal_account: str | None = None
    """Name of the block that its runs act for on Modal."""

    @classmethod
    def open(cls, request: SuiteRequest) -> Self:
        """Make or find the folder of `request`. Everything is checked before anything is written.

        Raises `ConfigError` for a wrong setting of any benchmark, and `IdentityError` when the folder holds a suite of
        another model.
        """
        config = load_suite(request.suite)
        configs = resolve_suite(request.model, config, request.overrides)
        folder = (request.suite_dir or suite_folder(request, config.name)).expanduser().absolute()
        keys = {name: serving_key(one) for name, one in configs.items()}
        entries = tuple(
            Entry(
                entry.benchmark,
                entry.name,
                hashlib.sha256(f"{id_of(folder)}/{entry.name}".encode()).hexdigest()[:8],
                kept(
                    settings_of(config, entry, request.overrides),
                    configs[entry.name],
                    list(keys.values()).count(keys[entry.name]),
                ),
                keys[entry.name],
                configs[entry.name].infra.target == "local" and configs[entry.name].infra.engine == "vllm",
                serving.placed(configs[entry.name]).infra.target == "modal",
                serving.overflow_after(configs[entry.name]),
            )
            for entry in config.benchmarks
        )
        suite = cls(folder, config.name, request.model, config.stage, entries, request.queue, request.modal_account)
        suite._claim()
        return suite

    def _claim(self) -> None:
        path = self.suite_dir / paths.SUITE
        if not path.is_file():
            self.suite_dir.mkdir(parents=True, exist_ok=True)
            write_json(path, {**self.describe(), "started_at": now(), "outcomes": {}})
            return
        before = read_json(path)
        for key in ("model", "suite"):
            if before[key] != self.describe()[key]:
                raise IdentityError(
                    f"{self.suite_dir} holds the suite {before['suite']} of {before['model']}, not {self.name} of {self.model}; "
                    "start a new one without a folder"
                )
        kept_rows = {name: row for name, row in before["outcomes"].items() if row["status"] == "complete"}
        write_json(path, {**before, **self.describe(), "outcomes": kept_rows})

    @property
    def suite_id(self) -> str:
        return id_of(self.suite_dir)

    def describe(self) -> dict[str, Any]:
        return {
            "suite_id": self.suite_id,
            "suite": self.name,
            "model": self.model,
            "stage": self.stage,
            "benchmarks": [entry.name for entry in self.entries],
        }

    def outcomes(self) -> list[Outcome]:
        """How each benchmark ended so far, in the suite's order; one that has not ended is `owed`."""
        held = read_json(self.suite_dir / paths.SUITE)["outcomes"]
        return [held.get(entry.name) or owed(entry.name) for entry in self.entries]

    def note(self, outcome: Outcome) -> None:
        """Write down how one benchmark ended, and the tables. One process writes a suite."""
        path = self.suite_dir / paths.SUITE
        data = read_json(path)
        data["outcomes"][outcome["benchmark"]] = outcome
        write_json(path, {**data, "finished_at": now()})
        rows = self.outcomes()
        write_whole(self.suite_dir / "table.md", [markdown_table(self.describe(), rows).encode()])
        write_whole(self.suite_dir / "table.csv", [csv_table(rows).encode()])

    def run_dir(self, entry: Entry) -> Path:
        """Where the run of a benchmark stands when it runs on this machine."""
        return folder_called(
            entry.run_id, resolve(self.model, load_benchmark(entry.benchmark), entry.overrides)
        ).absolute()


def evaluate_here(
    suite: Suite, entry: Entry, tags: list[str], variables: dict[str, str], stopping: threading.Event
) -> Outcome:
    """Run one benchmark in a process of its own on this machine, which ends with this one, and when it is `stopping`.

    Raises `SuiteError` with the process's own words when it fails; what was finished is kept for the next try.
    """
    folder = suite.suite_dir / "runs"
    folder.mkdir(exist_ok=True)
    run_dir, request, log = suite.run_dir(entry), folder / f"{entry.name}.json", folder / f"{entry.name}.log"
    asked = RunRequest(model=suite.model, benchmark=entry.benchmark, overrides=entry.overrides, run_dir=run_dir)
    write_whole(request, [asked.model_dump_json().encode()])
    begins_at = log.stat().st_size if log.is_file() else 0
    env = {**os.environ, **variables, "MODAL_EVAL_TAGS": ",".join(tags)}
    code = run_child(["run", str(request)], log, env, stopping)
    if code is None:
        raise SuiteError(f"{entry.name} was stopped with its suite; what is finished is kept")
    if code not in (EXIT_DONE, EXIT_INCOMPLETE):
        raise SuiteError(f"exit {code}: {last_words(log, begins_at)[-800:]} ({log})")
    return read_outcome(run_dir, entry.name)


def give_back(suite: Suite) -> None:
    """Stop the servers that were kept between the suite's benchmarks: nobody else comes for them.

    One that cannot be stopped keeps no other and no result: its lease stays, and it is logged.
    """
    ours = {str(suite.run_dir(entry)) for entry in suite.entries}
    for lease in serving.leases():
        if lease.kept and lease.run_dir in ours:
            try:
                serving.stop_lease(lease)
            except (ModalEvalError, OSError) as error:
                logger.warning(
                    "%s could not be given back: %s; its lease stays until the janitor or `modal-eval stop` ends it",
                    lease.app, error,
                )  # fmt: skip


def suite_folder(request: SuiteRequest, name: str) -> Path:
    group = f"{name}--{model_slug(request.model)}"
    return paths.output_root() / "suites" / group / (request.suite_id or secrets.token_hex(4))


def id_of(suite_dir: Path) -> str:
    """What tells a suite from all others: its folder's name where we made it, else a hash of where it stands."""
    ours = suite_dir.absolute().is_relative_to((paths.output_root() / "suites").absolute())
    return suite_dir.name if ours else hashlib.sha256(str(suite_dir.absolute()).encode()).hexdigest()[:8]


def kept(overrides: Overrides, config: RunConfig, sharing: int) -> Overrides:
    """A server that several benchmarks share stays between them, unless somebody has said how long."""
    given = overrides.model_dump()
    if sharing < 2 or config.infra.target == "endpoint" or "keep" in given.get("infra", {}):
        return overrides
    given.setdefault("infra", {})["keep"] = KEEP_S
    return Overrides.model_validate(given)


def owed(benchmark: str) -> Outcome:
    return {"benchmark": benchmark, "status": "owed"}


def failed(benchmark: str, error: str) -> Outcome:
    return {"benchmark": benchmark, "status": "failed", "error": " ".join(error.split())[:500]}


def outcome_of(summary: dict[str, Any], run_dir: Path | str) -> Outcome:
    """The row of a run whose `metadata.json` is `summary`."""
    kept_keys = (
        "benchmark", "status", "avg_reward", "stderr", "interval", "num_scored", "num_unscored", "num_truncated", "time_ms",
        "run_id", "model", "model_step", "model_stage", "identity_sha256", "finished_at",
    )  # fmt: skip
    return {**{key: summary.get(key) for key in kept_keys}, "run_dir": str(run_dir)}


def read_outcome(run_dir: Path, benchmark: str) -> Outcome:
    """The outcome of a run that has ended on this machine. Raises `ConfigError` when it left no numbers."""
    path = run_dir / paths.METADATA
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no {paths.METADATA}: the run of {benchmark} did not come to its end")
    return {**outcome_of(read_json(path), run_dir), "benchmark": benchmark}


def read_suite(suite_dir: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """What a suite's folder says: its facts, and a row for each benchmark. Raises `ConfigError` when it is none."""
    path = suite_dir / paths.SUITE
    if not path.is_file():
        raise ConfigError(f"{suite_dir} is no folder of a suite (it has no {paths.SUITE})")
    data = read_json(path)
    return data, [data["outcomes"].get(name) or owed(name) for name in data["benchmarks"]]


def baseline_of(suite_dir: Path, name: str) -> Path:
    """Store a suite's runs as the baseline `name`. Raises `ConfigError` when a benchmark is not complete."""
    facts, rows = read_suite(suite_dir)
    if wanting := [row["benchmark"] for row in rows if row["status"] != "complete"]:
        raise ConfigError(
            f"{', '.join(wanting)}: not complete in {suite_dir}, so this is no baseline; run the suite again there"
        )
    return save_baseline(name, facts["model"], {row["benchmark"]: Path(row["run_dir"]) for row in rows})
