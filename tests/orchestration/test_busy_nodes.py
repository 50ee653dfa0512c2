"""More runs than GPUs, on two nodes with real workers: the lease log says that no GPU idles while a job that fits waits."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest

from modal_eval.gpus import Folder, history
from tests.support.checkpoints import checkpoint
from tests.support.gpus import Machine
from tests.support.installations import on_postgresql_and_redis
from tests.support.processes import Mark
from tests.support.team import Team, installed, write_lines
from tests.support.vllm_environment import vllm_environment

QUEUES = ("high", "default", "nightly")
RUNS = 40
SLOTS = 10
"""Runs that one node's worker has at a time, on eight GPUs: some of them wait for a lease, the others in the pool."""
IDLE_SHARE = 0.02
"""Of the GPUs' time: those who wait look twice a second, and forty runs share this machine's processors."""


def pending_at(team: Team, flow_run: str) -> str:
    """When a worker took it."""
    states = team.get(f"flow_run_states/?flow_run_id={flow_run}")
    return min(str(one["timestamp"]) for one in states if one["type"] == "PENDING")


@pytest.mark.slow
def test_forty_runs_on_sixteen_gpus_leave_none_idle_that_is_wanted_and_keep_their_priorities(
    tmp_path: Path, mark: Mark, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "run_step40"
    model.mkdir()
    for name, content in checkpoint({"model.safetensors": ("a",)}).items():
        (model / name).write_bytes(content)
    problems = write_lines(
        tmp_path / "aime.jsonl", [{"question": f"What is {n} times 2?", "answer": str(2 * n)} for n in range(16)]
    )
    environment = vllm_environment(tmp_path / "vllm", latency=2, answer="It is \\boxed{14}.")
    machines = {name: tmp_path / f"machine-{name}" for name in ("node-1", "node-2")}
    for folder in machines.values():
        folder.mkdir()
    with (
        tempfile.TemporaryDirectory(prefix="modal-eval-busy-") as name,  # PostgreSQL's user has to get in
        on_postgresql_and_redis(Path(name), mark) as server,  # SQLite would be what everybody waits for
        installed(tmp_path, server.variables["PREFECT_API_URL"], server.variables) as team,
    ):
        runs = {}
        for number in range(RUNS):
            queue = QUEUES[number % 4 % 3]
            overrides = {
                "env": {"data_files": str(problems)},
                "eval": {"rollouts": 1, "max_concurrent": 4},
                "infra": {"environment": str(environment)},
                "vllm": {"tensor_parallel_size": 2 if number % 5 == 0 else 1},
            }
            run = team.run("eval/aime2025", queue=queue, model=str(model), target="node", overrides=overrides)
            runs[run] = queue
        first, second = (Machine(folder) for folder in machines.values())
        with (
            team.worker("a100", "node-1", f"--limit={SLOTS}", machine=first.env(team.cli.env)),
            team.worker("a100", "node-2", f"--limit={SLOTS}", machine=second.env(team.cli.env)),
        ):
            ended = Counter(team.ended(run)["state_name"] for run in runs)
        assert ended == {"Completed": RUNS}
        taken = sorted(runs, key=lambda run: pending_at(team, run))

    order = [QUEUES.index(runs[run]) for run in taken]
    assert order == sorted(order), "a run was taken before one of a higher priority"
    for name, machine in zip(machines, (first, second), strict=True):
        events = history.read(Folder(machine.leases.path))
        told = history.leases(events)
        used = history.usage(events, range(8))
        with capsys.disabled():
            print(
                f"\n{name}: {len(told)} leases, GPUs leased {used.leased_s / used.all_s:.0%} of {used.all_s / 8:.0f} s, "
                f"{used.wanted_idle_s:.1f} of {used.all_s:.0f} GPU-seconds idle while wanted, longest wait "
                f"{max(one.waited_s for one in told):.0f} s"
            )
        assert all(one.until is not None for one in told)
        assert used.wanted_idle_s <= IDLE_SHARE * used.all_s
        assert machine.leased() == []
