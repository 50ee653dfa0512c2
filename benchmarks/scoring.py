"""Scoring 164×4 HumanEval+ samples: EvalPlus's own `evalplus.evaluate` beside `modal-eval score` with the full sandbox.

    python benchmarks/scoring.py [--samples 4] [--workers CORES]

Four samples a problem: the reference, the recorded answer of a real model, and each of them again; but for the recorded answer
to HumanEval/163, which fills all the memory that it is given, 4 GB on either side. Both sides get the same code, as many workers, and what the reference solutions return from their own cache, filled before. Wall time is that of the
whole command; memory is the most that all its processes hold together, looked at five times a second, and a page that several
of them share counts once (PSS). CPU time is the whole machine's: a sandbox takes its processes' share along when it ends.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modal_eval.environments import ensure_environment
from tests.support.chat import Call, Reply, chat_server
from tests.support.data import DATA

FILLS_MEMORY = ("HumanEval/163",)
POLL_S = 0.2
PLUS = DATA / "humaneval_plus" / "HumanEvalPlus-v0.1.10.jsonl.gz"
RECORDED = DATA / "labelled" / "humaneval_plus_evalresults" / "meta-llama--Meta-Llama-3-8B-Instruct.jsonl.gz"


@dataclass(frozen=True)
class Measured:
    seconds: float
    cpu_s: float
    peak_mb: float


def read(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def measure(command: Sequence[str], env: dict[str, str], log: Path) -> Measured:
    """Run to the end and watch the whole tree's memory."""
    began, peak = time.monotonic(), 0
    before = busy_s()
    with log.open("wb") as out, subprocess.Popen(command, env={**os.environ, **env}, stdout=out, stderr=out) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, tree_bytes(tree))
            time.sleep(POLL_S)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}; it said:\n{log.read_text()[-2000:]}")
    return Measured(time.monotonic() - began, busy_s() - before, peak / 1e6)


def busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def tree_bytes(root: psutil.Process) -> int:
    total = 0
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if not PLUS.is_file():
        sys.exit(f"{PLUS} is not there; set MODAL_EVAL_TEST_DATA")
    problems = read(PLUS)
    recorded = {row["task_id"]: row["solution"] for row in read(RECORDED)}
    for each in problems:
        if each["task_id"] in FILLS_MEMORY:
            recorded[each["task_id"]] = each["prompt"] + each["canonical_solution"]
    samples = {
        each["task_id"]: ([each["prompt"] + each["canonical_solution"], recorded[each["task_id"]]] * options.samples)[
            : options.samples
        ]
        for each in problems
    }
    with tempfile.TemporaryDirectory(prefix="modal-eval-benchmark-") as name:
        folder = Path(name)
        ours = score_ours(folder, problems, samples, options)
        theirs = score_theirs(folder, problems, samples, options)
    ratio = ours.seconds / theirs.seconds
    print(f"{len(problems)} × {options.samples} samples of HumanEval+, {options.workers} workers")
    print(f"EvalPlus    {theirs.seconds:7.1f} s  {theirs.cpu_s:7.1f} s of CPU  {theirs.peak_mb:7.0f} MB")
    print(f"modal-eval  {ours.seconds:7.1f} s  {ours.cpu_s:7.1f} s of CPU  {ours.peak_mb:7.0f} MB")
    print(
        f"modal-eval takes {ratio:.2f} of EvalPlus's time (wanted: at most 1.00) and {ours.peak_mb:.0f} MB (wanted: under 500)"
    )
    return 0 if ratio <= 1.0 and ours.peak_mb < 500 else 1


def score_ours(
    folder: Path, problems: list[dict[str, str]], samples: dict[str, list[str]], options: argparse.Namespace
) -> Measured:
    cli = [sys.executable, "-m", "modal_eval.cli"]
    run_dir, env = (
        folder / "run",
        {"MODAL_EVAL_STATE_DIR": str(folder / "state"), "PREFECT_HOME": str(folder / "prefect")},
    )

    def answer(call: Call) -> Reply:
        example, rollout = map(int, call.tag.split("/"))
        return Reply(f"```python\n{samples[problems[example]['task_id']][rollout]}\n```")

    with chat_server(answer) as server:
        generate = [
            *cli, "run", "-m", "stub", "-b", "humaneval_plus", "--run-dir", str(run_dir), f"--infra.base_url={server.url}",
            f"--env.data_files={PLUS}", f"--eval.rollouts={options.samples}", f"--eval.scoring_workers={options.workers}",
        ]  # fmt: skip
        measure(generate, env, folder / "run.log")
    return measure([*cli, "score", str(run_dir)], env, folder / "score.log")


def score_theirs(
    folder: Path, problems: list[dict[str, str]], samples: dict[str, list[str]], options: argparse.Namespace
) -> Measured:
    python = ensure_environment("evalplus-cli")
    env = {"HUMANEVAL_OVERRIDE_PATH": str(unpacked(folder)), "XDG_CACHE_HOME": str(folder / "cache")}

    def evaluate(name: str, count: int) -> Measured:
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for each in problems:
                for code in samples[each["task_id"]][:count]:
                    file.write(json.dumps({"task_id": each["task_id"], "solution": code}) + "\n")
        command = [str(python), "-m", "evalplus.evaluate", "--dataset", "humaneval", "--samples", str(path)]
        return measure([*command, "--parallel", str(options.workers)], env, folder / f"{name}.log")

    evaluate("warm-up", 1)  # fills its cache of expected outputs
    return evaluate("samples", options.samples)


def unpacked(folder: Path) -> Path:
    path = folder / "HumanEvalPlus.jsonl"
    path.write_bytes(gzip.decompress(PLUS.read_bytes()))
    return path


if __name__ == "__main__":
    sys.exit(main())
