"""Generate: run the harness against the proxy, and put every finished rollout on disk as it comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_eval import paths
from modal_eval.errors import HarnessError, JournalError, ModalEvalError, ServerError
from modal_eval.harnesses.environment import environment_for
from modal_eval.harnesses.job import HarnessStart, Phase
from modal_eval.harnesses.run import Results, run_harness
from modal_eval.proxy import Proxy, answered_rollouts
from modal_eval.records import Row
from modal_eval.results.files import write_json
from modal_eval.results.progress import Progress, timed
from modal_eval.results.rows import Key, RowWriter, is_generated, latest_rows, read_rows, row_key
from modal_eval.results.run_folder import Run, refuse_other_identity
from modal_eval.stages.preparing import FACTS, harness_job, read_prepared
from modal_eval.stages.serving import death_of, proxy_fault

STATS_INTERVAL_S = 0.5


def wanted_rollouts(run_dir: Path) -> set[Key]:
    """Every (example_id, rollout) that the configuration asks for."""
    run = Run.load(run_dir)
    _, prepared = read_prepared(run_dir)
    return {(ex, rollout) for ex in range(prepared["total_examples"]) for rollout in range(run.config.eval.rollouts)}


def known_rows(run_dir: Path) -> dict[Key, Row]:
    """The rows that earlier attempts left, one per rollout, within what is asked for now."""
    wanted = wanted_rollouts(run_dir)
    return {key: row for key, row in latest_rows(read_rows(run_dir / paths.RESULTS)).items() if key in wanted}


def owed_rollouts(run_dir: Path) -> set[Key]:
    """Rollouts for which the server has not given everything yet."""
    return wanted_rollouts(run_dir) - {key for key, row in known_rows(run_dir).items() if is_generated(row)}


@dataclass
class Pass:
    """One run of the harness over what is owed."""

    run: Run
    proxy: Proxy
    progress: Progress
    write: Callable[[Row], None]
    on_start: Callable[[HarnessStart], None] | None = None
    """Refuses what is about to run; left out, all that is not as it was prepared."""
    stats: dict[str, Any] = field(default_factory=dict)
    read_at: float = 0.0

    def proxy_stats(self) -> dict[str, Any]:
        if time.monotonic() - self.read_at >= STATS_INTERVAL_S:
            self.stats, self.read_at = self.proxy.stats(), time.monotonic()
        return self.stats

    def count_up(self) -> None:
        """Write the final counts of this pass, as far as the proxy is still there to say them."""
        with contextlib.suppress(JournalError):
            self.stats = self.proxy.stats()
        self.progress.report(self.stats, force=False)
        self.progress.write()

    def on_row(self, row: Row) -> None:
        self.write(row)
        self.progress.add(row, self.stats)

    def on_results(self, results: Results) -> None:
        write_json(self.run.run_dir / paths.HARNESS_RESULTS, {"rollouts": self.progress.total_rollouts, **results})

    def should_stop(self) -> str | None:
        if death := death_of(self.run.run_dir):
            return death
        stats = self.proxy_stats()
        self.progress.report(stats)
        return proxy_fault(stats)


def generate(run_dir: Path, proxy: Proxy | None) -> dict[str, int]:
    """Run what is owed and return how many rollouts are finished and how many are unscored.

    Finished calls are answered from the journal. Raises `HarnessError` when the harness, the proxy or the server
    dies; everything that was finished by then is on disk.
    """
    run = Run.load(run_dir)
    _, prepared = read_prepared(run_dir)
    known = known_rows(run_dir)
    progress = Progress(run, prepared["total_examples"])
    progress.add_known(list(known.values()))
    done = frozenset(key for key, row in known.items() if is_generated(row))
    if len(done) < progress.total_rollouts:
        if proxy is None:
            raise HarnessError(f"{progress.total_rollouts - len(done)} rollouts are owed, but there is no proxy to ask")
        (run_dir / paths.METADATA).unlink(missing_ok=True)  # the numbers of an earlier, smaller or incomplete run
        progress.write("generate")  # who watches sees from the first moment how much there is to do
        with timed(run_dir, "generate"), RowWriter(run_dir / paths.RESULTS) as writer:
            run_pass(Pass(run, proxy, progress, writer.append), done)
    progress.write("generated")
    return {
        "total_rollouts": progress.total_rollouts,
        "finished_rollouts": progress.finished_rollouts,
        "unscored": progress.total_rollouts - progress.finished_rollouts,
    }


def run_pass(one: Pass, done: frozenset[Key], phase: Phase = "generate") -> None:
    """Run the harness once over everything that is not `done`."""
    model, prepared = read_prepared(one.run.run_dir)
    one.proxy.begin_pass()
    job = harness_job(one.run.config, base_url=one.proxy.base_url, model=model.served_name, done=done, phase=phase)
    try:
        run_harness(
            job,
            run_dir=one.run.run_dir,
            python=environment_for(one.run.config),
            on_row=one.on_row,
            on_start=one.on_start or refuse_other_start(one.run.run_dir, prepared),
            should_stop=one.should_stop,
            on_results=one.on_results,
        )
    except HarnessError as error:
        raise named_fault(one) or error from error
    finally:
        one.count_up()
    if fault := named_fault(one):  # with the proxy gone the harness ends by itself, fast and empty-handed
        raise fault


def named_fault(one: Pass) -> ModalEvalError | None:
    """The fault behind a harness that was ended: with a dead server or a full disk another try is useless."""
    if death := death_of(one.run.run_dir):
        return ServerError(death)
    if one.stats.get("journal_error"):
        return JournalError(proxy_fault(one.stats))
    if fault := proxy_fault(one.stats):
        return ServerError(fault)
    return None


def refuse_other_start(run_dir: Path, prepared: dict[str, Any]) -> Callable[[HarnessStart], None]:
    """Raise `IdentityError` that names what the harness says otherwise than when the run was prepared.

    What `prepare` found may come from Prefect's cache, whose key cannot hold everything: packages of an environment that
    the team installs, a data set without a pinned revision.
    """
    check_size = refuse_other_size(prepared["total_examples"])

    def check(start: HarnessStart) -> None:
        now = {name: dict(getattr(start, name)) for name in FACTS}
        refuse_other_identity(run_dir, {name: prepared[name] for name in FACTS}, now)
        check_size(start)

    return check


def refuse_other_size(expected: int) -> Callable[[HarnessStart], None]:
    """The data may not change between preparing and generating: positions would mean other examples."""

    def check(start: HarnessStart) -> None:
        if start.total_examples != expected:
            raise HarnessError(
                f"the environment has {start.total_examples} examples now and had {expected} when the run was prepared; "
                "pin its data revision and start a new run"
            )

    return check


def owed_and_answered(run_dir: Path) -> bool:
    """Whether something is owed whose every rollout has calls in the journal: it may need no server at all."""
    owed = owed_rollouts(run_dir)
    return bool(owed) and {f"{example}/{rollout}" for example, rollout in owed} <= answered_rollouts(
        run_dir / paths.JOURNAL
    )


def finish_from_journal(run_dir: Path, proxy: Proxy) -> int:
    """Finish every owed rollout that the journal answers to its end; returns how many. The rest stays owed."""
    run = Run.load(run_dir)
    _, prepared = read_prepared(run_dir)
    known = known_rows(run_dir)
    progress = Progress(run, prepared["total_examples"])
    progress.add_known(list(known.values()))
    before = progress.finished_rollouts
    with RowWriter(run_dir / paths.RESULTS) as writer:

        def keep_if_generated(row: Row) -> None:
            if is_generated(row):
                writer.append(row)

        run_pass(
            Pass(run, proxy, progress, keep_if_generated),
            frozenset(key for key, row in known.items() if is_generated(row)),
        )
    return progress.finished_rollouts - before


def replay(
    run_dir: Path,
    proxy: Proxy,
    done: dict[Key, Row],
    *,
    run: Run | None = None,
    on_start: Callable[[HarnessStart], None] | None = None,
) -> dict[Key, Row]:
    """Score every rollout but those `done` again from the journal; nothing is generated and no row is written.

    `run` replaces the configuration that the folder holds, and `on_start` refuses a harness that would ask differently.
    """
    run = run or Run.load(run_dir)
    _, prepared = read_prepared(run_dir)
    progress = Progress(run, prepared["total_examples"], stage="score")
    progress.add_known(list(done.values()))
    rows: dict[Key, Row] = {}

    def keep(row: Row) -> None:
        rows[row_key(row)] = row

    run_pass(Pass(run, proxy, progress, keep, on_start), frozenset(done), phase="score")
    return rows
