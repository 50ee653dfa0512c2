"""Score a run again from its journal: with another scorer version, extraction or k, without any server.

What an answer depends on stays as it is; a difference there is refused by name before anything is touched. The numbers
that the run had are kept in `scores/N/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modal_eval import paths
from modal_eval.config.identity import config_identity, differences
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides, RunConfig
from modal_eval.errors import IdentityError
from modal_eval.harnesses.job import HarnessStart
from modal_eval.records import Row
from modal_eval.results.files import write_json
from modal_eval.results.progress import timed
from modal_eval.results.rows import Key, is_scored, rewrite_in_order
from modal_eval.results.run_folder import Run, refuse_other_identity
from modal_eval.stages.generating import known_rows, refuse_other_size
from modal_eval.stages.preparing import read_prepared
from modal_eval.stages.scoring import replay_from_journal

SCORING_SETTINGS = (
    "eval.k",
    "eval.scoring_workers",
    "eval.max_unscored",
    "eval.rollout_timeout",
    "eval.packages",
    "eval.environment",
    "eval.module_paths",
)
"""What may differ, beside the benchmark's `scoring_args`. Another package or module is another scorer version; whether it
asks the same is checked once it is loaded."""


def rescore(run_dir: Path, overrides: Overrides | None = None) -> Path | None:
    """Replace `results.jsonl` by rows made from the journal alone; returns the folder with the earlier results, if any.

    Raises `IdentityError` that names what would change an answer: a setting, the data, the prompts, or calls that the
    journal does not have. Until every row is made, nothing of the run is changed.
    """
    run = Run.load(run_dir)
    again = Run(run.run_dir, rescoring_config(run, overrides or Overrides()))
    _, prepared = read_prepared(run_dir)
    earlier = known_rows(run_dir)
    starts: list[HarnessStart] = []
    with timed(run_dir, "score"):
        rows = replay_from_journal(
            run_dir, {}, run=again, on_start=_remembering(refuse_other_prompts(prepared), starts)
        )
        refuse_lost_answers(earlier, rows)
        kept = keep_earlier_scores(run_dir)
        (run_dir / paths.METADATA).unlink(
            missing_ok=True
        )  # the earlier scorer's numbers belong to no rows here any more
        again.update(config=again.config.model_dump(mode="json"))
        scorer = {"harness": starts[0].harness, "environment": starts[0].environment} if starts else {}
        write_json(run_dir / paths.PREPARED, {**prepared, **scorer})
        rewrite_in_order(run_dir / paths.RESULTS, (with_time_of(row, earlier.get(key)) for key, row in rows.items()))
    return kept


def rescoring_config(run: Run, overrides: Overrides) -> RunConfig:
    """The run's configuration with `overrides`, all of which have to leave every answer as it is."""
    held = run.config.model_dump(exclude={"model"})
    config = resolve(run.config.model, BenchmarkConfig(**held), overrides)
    allowed = {*SCORING_SETTINGS, *(f"env_args.{name}" for name in config.scoring_args)}
    refused = [
        f"{key}: {before!r} in the folder, {now!r} asked for"
        for key, before, now in differences(run.config.model_dump(), config.model_dump())
        if not any(key == one or key.startswith(f"{one}.") for one in allowed)
    ]
    if refused:
        options = [f"--{name.replace('env_args.', 'env.')}" for name in sorted(allowed)]
        raise IdentityError(
            f"scoring again cannot change what was asked or answered ({'; '.join(refused)}). Start a new run for that; "
            f"what `modal-eval score` takes for {run.config.name} is {', '.join(options)}"
        )
    if before := run.identity():
        now = config_identity(config)
        del now["harness"]  # its packages may be newer: the prompts are compared instead
        refuse_other_identity(run.run_dir, before, now)
    return config


def refuse_other_prompts(prepared: dict[str, Any]) -> Callable[[HarnessStart], None]:
    """A newer scorer may know better answers; it has to ask the same questions, for these are what was answered."""
    check_size = refuse_other_size(prepared["total_examples"])

    def check(start: HarnessStart) -> None:
        check_size(start)
        before, now = prepared["data"].get("prompts_sha256"), start.data.get("prompts_sha256")
        if before and before != now:
            raise IdentityError(
                f"this version of the environment asks other prompts (data.prompts_sha256: {before!r} in the folder, {now!r} "
                "now), which nobody has answered; start a new run, or go back to the version that the run was made with"
            )

    return check


def refuse_lost_answers(earlier: dict[Key, Row], rows: dict[Key, Row]) -> None:
    """Rollouts that had a score and now ask what the journal does not answer: this scorer goes on differently."""
    lost = [
        key
        for key, row in earlier.items()
        if is_scored(row) and ((rows.get(key) or {}).get("error") or {}).get("fault") == "server"
    ]
    if lost:
        example, rollout = lost[0]
        raise IdentityError(
            f"{len(lost)} of the rollouts that have a score ask something now that the journal does not answer, the first of "
            f"them example {example} rollout {rollout}: {rows[lost[0]]['error']['message']}. The earlier results stand; start a "
            "new run for an environment that asks differently"
        )


def keep_earlier_scores(run_dir: Path) -> Path | None:
    """Copy the results that are about to be replaced to `scores/N/`, whole or not at all."""
    present = [run_dir / name for name in (paths.RESULTS, paths.METADATA) if (run_dir / name).is_file()]
    if not present:
        return None
    scores = run_dir / paths.SCORES
    scores.mkdir(exist_ok=True)
    numbers = [int(folder.name) for folder in scores.iterdir() if folder.name.isdecimal()]
    folder, partial = scores / str(max(numbers, default=0) + 1), scores / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in present:
        shutil.copyfile(path, partial / path.name)
    return partial.rename(folder)


def with_time_of(row: Row, earlier: Row | None) -> Row:
    """`row` with the time that its answer took when it was generated; a replay takes none."""
    if earlier is None or earlier.get("generation_ms") is None:
        return row
    return {
        **row,
        "generation_ms": earlier["generation_ms"],
        "total_ms": round(earlier["generation_ms"] + (row.get("scoring_ms") or 0.0), 3),
    }


def _remembering(check: Callable[[HarnessStart], None], starts: list[HarnessStart]) -> Callable[[HarnessStart], None]:
    def on_start(start: HarnessStart) -> None:
        check(start)
        starts.append(start)

    return on_start
