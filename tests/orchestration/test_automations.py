"""What a Prefect server does by itself, on one with all its services: each trigger meets a real event."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.aws import aws_server
from tests.support.checkpoints import checkpoint
from tests.support.prefect_server import prefect_server
from tests.support.processes import until
from tests.support.team import Team, installed
from tests.support.upstream import upstream

NOTICED_S = 240.0
"""The automation waits for 120 s without a heartbeat, and looks every few seconds."""


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
