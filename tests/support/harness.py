"""Run a fixture environment through the real harness process, and look at what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_eval.environments import ensure_environment
from modal_eval.harnesses import HarnessJob, HarnessReport, HarnessStart, run_harness

FIXTURES = Path(__file__).parents[1] / "fixtures" / "environments"
LOCKED = {"legacy": "verifiers-legacy", "v1": "verifiers-v1"}

SEED_KEYS = [
    "example_id", "prompt", "completion", "task", "reward", "generation_ms", "scoring_ms", "total_ms", "info",
    "has_error",
]  # fmt: skip
"""The columns that the team's tools read; ours come beside them."""
OUR_KEYS = [
    "rollout", "answer", "error", "finish_reason", "truncated", "empty", "usage", "num_turns", "stop_condition",
]  # fmt: skip


@dataclass
class Ran:
    """What a harness said while it ran."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[HarnessStart] = field(default_factory=list)
    report: HarnessReport | None = None

    def by_key(self) -> dict[tuple[int, int], dict[str, Any]]:
        return {(row["example_id"], row["rollout"]): row for row in self.rows}

    def rewards(self) -> dict[tuple[int, int], float | None]:
        return {key: row["reward"] for key, row in sorted(self.by_key().items())}


def job(env_id: str, base_url: str, api: str = "legacy", **changes: Any) -> HarnessJob:
    defaults: dict[str, Any] = {
        "env_args": {},
        "model": "stub",
        "sampling": {"temperature": 0.5, "max_tokens": 20},
        "num_examples": None,
        "rollouts": 1,
        "max_concurrent": 8,
        "rollout_timeout_s": 60.0,
        "module_paths": (FIXTURES,),
    }
    return HarnessJob(env_id=env_id, base_url=base_url, api=api, **{**defaults, **changes})


def run(a_job: HarnessJob, run_dir: Path, **hooks: Any) -> Ran:
    """Run `a_job` in its locked environment, which is made on first use."""
    ran = Ran()
    python = ensure_environment(LOCKED[a_job.api])
    hooks = {"on_row": ran.rows.append, "on_start": ran.starts.append, "should_stop": lambda: None, **hooks}
    ran.report = run_harness(a_job, run_dir=run_dir, python=python, **hooks)
    return ran
