"""What a Prefect server does by itself, on one with all its services: each trigger meets a real event."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.aws import aws_server
from tests.support.checkpoints import checkpoint
from tests.support.gpus import Machine
from tests.support.prefect_server import prefect_server
from tests.support.processes import until
from tests.support.team import Team, installed, write_lines
from tests.support.upstream import upstream
from tests.support.vllm_environment import vllm_environment

NOTICED_S = 240.0
"""The automation waits for 120 s without a heartbeat, and looks every few seconds."""
PUT_BACK_S = 480.0
"""The automation waits for 300 s."""


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    with (
        prefect_server(tmp_path_factory.mktemp("server")) as server,
        installed(tmp_path_factory.mktemp("team"), server.api_url) as made,
    ):
        yield made


def test_a_new_checkpoint_starts_its_suite_once_on_the_folder_in_which_it_stands(team: Team, tmp_path: Path) -> None:
    with aws_server(tmp_path / "aws") as server:
        mine, _ = server.fresh()
        files = checkpoint({"model.safetensors": ("a",)})
        mine.put("runs/job/math_step40", files, list(files))
        team.cli.env |= mine.env
        watch = ["watch", "once", f"s3://{mine.bucket}/runs", "--settle=0"]
        team.cli(*watch)
        until(lambda: team.flow_runs("suite:full"), NOTICED_S)
        mine.put("runs/job/math_step40", files, list(reversed(files)))
        team.cli(*watch)
        mine.put("runs/job/math_step80", checkpoint({"model.safetensors": ("b",)}), list(files))
        team.cli(*watch)
        until(lambda: len(team.flow_runs("suite:full")) > 1, NOTICED_S)
    models = sorted(run["parameters"]["model"] for run in team.flow_runs("suite:full"))
    assert models == [f"s3://{mine.bucket}/runs/job/math_step{step}" for step in (40, 80)]


def test_a_run_whose_machine_died_is_crashed_without_a_heartbeat_and_another_node_finishes_it(team: Team) -> None:
    with upstream(latency=0.5) as server:
        asked = {
            "target": "endpoint",
            "overrides": {"infra": {"base_url": server.base_url}, "eval": {"max_concurrent": 2}},
        }
        with team.worker("a100", "first"):
            run = team.run("eval/demo", model="stub", num_examples=30, **asked)
            server.wait_for_posts(8, timeout=240)
            for pid in team.cli.mark.processes():
                os.kill(pid, signal.SIGKILL)
        assert team.flow_run(run)["state_type"] == "RUNNING"
        until(lambda: team.flow_run(run)["state_type"] == "CRASHED", NOTICED_S)
        assert "no heartbeat for 120 s" in team.flow_run(run)["state"]["message"]
        server.script(default={"latency": 0})
        with team.worker("a100", "second"):
            team.retry(run)
            assert team.ended(run)["state_type"] == "COMPLETED", team.logs(run)
        assert server.stats()["posts"] <= 30 + 2, "more was generated twice than was in flight"


def test_a_killed_worker_leaves_no_gpu_and_no_server_and_the_other_node_goes_on_from_the_journal(
    team: Team, tmp_path: Path
) -> None:
    model = tmp_path / "run_step40"
    model.mkdir()
    for name, content in checkpoint({"model.safetensors": ("a",)}).items():
        (model / name).write_bytes(content)
    problems = [{"question": f"What is {number} times 2?", "answer": str(2 * number)} for number in range(16)]
    overrides = {
        "env": {"data_files": str(write_lines(tmp_path / "aime.jsonl", problems))},
        "eval": {"rollouts": 1, "max_concurrent": 2},
        "infra": {"environment": str(vllm_environment(tmp_path / "vllm", latency=1))},
    }
    first, second = (Machine(folder) for folder in (tmp_path / "first", tmp_path / "second") if folder.mkdir() is None)
    with team.worker("a100", "killed", machine=first.env(team.cli.env)):
        run = team.run("eval/aime2025", model=str(model), target="node", overrides=overrides)
        outputs = team.cli.folder / "outputs"
        until(lambda: len(journaled(outputs, run)) >= 6, NOTICED_S)
        assert first.leased()
        (worker,) = [
            pid
            for pid, line in team.cli.mark.processes().items()
            if "modal_eval.cli worker" in line and "guardian" not in line
        ]
        os.kill(worker, signal.SIGKILL)
        until(lambda: team.flow_run(run)["state_type"] == "CRASHED", NOTICED_S)
        until(lambda: first.leased() == [], 60)
        until(lambda: not [line for line in team.cli.mark.processes().values() if "support.upstream" in line], 60)
    kept = journaled(outputs, run)
    with team.worker("a100", "other", machine=second.env(team.cli.env)):
        team.retry(run)
        assert team.ended(run)["state_type"] == "COMPLETED", team.logs(run)
    assert kept <= journaled(outputs, run) == Counter(f"{number}/0" for number in range(16))
    assert second.leased() == []


@pytest.fixture(scope="module", autouse=True)
def lost(team: Team) -> Iterator[str]:
    """A run that a worker took with its last breath, before anything else happens here."""
    with upstream() as server:
        asked = {"target": "endpoint", "overrides": {"infra": {"base_url": server.base_url}}}
        run = team.run("eval/on-modal", benchmark="demo", model="stub", num_examples=2, **asked)
        team.post(f"flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})
        yield run


def test_a_run_whose_worker_died_before_it_began_is_put_back_and_the_next_worker_runs_it(team: Team, lost: str) -> None:
    until(lambda: team.flow_run(lost)["state"]["name"] == "AwaitingRetry", PUT_BACK_S)
    with team.worker("modal", "next", "--queue", "default"):
        assert team.ended(lost)["state_type"] == "COMPLETED", team.logs(lost)


def journaled(outputs: Path, run: str) -> Counter[str]:
    """How often each rollout's answer is on disk."""
    found: Counter[str] = Counter()
    for path in outputs.glob(f"*/{run.replace('-', '')[-8:]}/checkpoint.jsonl"):
        for line in path.read_bytes().splitlines()[1:]:
            with contextlib.suppress(ValueError):  # cut off by the kill
                found[json.loads(line).get("tag", "")] += 1
    del found[""]  # what the server said of its models
    return found
