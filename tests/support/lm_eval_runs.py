"""Run lm-eval's tasks through its real adapter in its real environment, against a scripted server."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import Overrides, RunConfig
from modal_eval.environments import ensure_environment
from modal_eval.harnesses import HarnessJob, HarnessStart, run_harness
from modal_eval.harnesses.job import Phase
from modal_eval.stages.preparing import harness_job
from tests.support.data import data_file

LOADER = Path(__file__).with_name("lm_eval_loads.py")
DATA = {
    "gsm8k": "gsm8k/test.jsonl",
    "math": "math/test_5000.jsonl.gz",
    "ifeval": "ifeval/input_data.jsonl",
    "mbpp": "mbpp/mbpp.jsonl",
    "humaneval": "humaneval/HumanEval.jsonl.gz",
    "mmlu": "mmlu_pro/test.jsonl.gz",
}


@dataclass
class Ran:
    """What the adapter said."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[HarnessStart] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in sorted(self.rows, key=lambda row: (row["example_id"], row["rollout"]))]


def shipped(benchmark: str, data: str | Path, model: str = "stub", **overrides: Any) -> RunConfig:
    """The shipped benchmark on a file of the test data, or on one of the test's own."""
    path = data if isinstance(data, Path) else data_file(DATA[data])
    env = {"data_files": str(path), **overrides.pop("env", {})}
    return resolve(model, load_benchmark(benchmark), Overrides(env=env, **overrides))


def run(config: RunConfig, base_url: str, run_dir: Path, phase: Phase = "score", **changes: Any) -> Ran:
    """Run one phase; `score` alone asks everything itself, because the server stands where the journal would."""
    return run_job(harness_job(config, base_url=base_url, model=config.model, phase=phase, **changes), run_dir)


def run_job(job: HarnessJob, run_dir: Path) -> Ran:
    ran = Ran()
    run_harness(
        job, run_dir=run_dir, python=ensure_environment("lm-eval"), on_row=ran.rows.append, on_start=ran.starts.append,
        should_stop=lambda: None, on_results=ran.results.append,
    )  # fmt: skip
    return ran


def job(env_id: str, base_url: str = "http://127.0.0.1:9/v1", phase: Phase = "score", **changes: Any) -> HarnessJob:
    """A job that no benchmark describes."""
    defaults: dict[str, Any] = {
        "env_args": {}, "model": "stub", "sampling": {"temperature": 0.0, "top_p": 1.0, "max_tokens": 64, "seed": 42},
        "num_examples": None, "rollouts": 1, "max_concurrent": 8, "rollout_timeout_s": 60.0,
    }  # fmt: skip
    return HarnessJob(env_id=env_id, base_url=base_url, harness="lm_eval", phase=phase, **{**defaults, **changes})


def loads(requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Load many jobs in one process: what each is, or the message with which it is refused."""
    command = [str(ensure_environment("lm-eval")), str(LOADER)]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    replies: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return replies
