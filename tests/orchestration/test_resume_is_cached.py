"""What a Prefect server is told of a run and of its resume, asked by its REST API as the UI asks it."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.cli import Cli, kill, repeated
from tests.support.prefect_server import post
from tests.support.processes import Mark
from tests.support.upstream import upstream

WITHIN_S = 60.0
WHOLE = ["prepare", "replay", "deploy_server", "start_proxy", "generate", "teardown", "score", "report"]
ENDED = {"Completed", "Cached"}


def ask(api: str, what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    return list(post(f"{api}/{what}/filter", query))


def eval_runs_since(api: str, began: datetime) -> list[dict[str, Any]]:
    return ask(
        api, "flow_runs",
        {
            "flows": {"name": {"any_": ["eval"]}},
            "flow_runs": {"start_time": {"after_": began.isoformat()}},
            "sort": "START_TIME_ASC",
        },
    )  # fmt: skip


def task_states(api: str, flow_run: dict[str, Any]) -> list[tuple[str, str]]:
    """(task, state) in the order in which they began; a task run's name is its task's with a suffix."""
    found = ask(
        api, "task_runs",
        {"flow_runs": {"id": {"any_": [flow_run["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"},
    )  # fmt: skip
    return [(one["name"].rpartition("-")[0], one["state"]["name"]) for one in found]


def ended_tasks(api: str, flow_run: dict[str, Any], count: int) -> list[tuple[str, str]]:
    """The states of `count` tasks once all have ended: Prefect sends them in the background, some after the flow."""
    deadline = time.monotonic() + WITHIN_S
    while True:
        states = task_states(api, flow_run)
        if len(states) >= count and {state for _, state in states} <= ENDED:
            return states
        assert time.monotonic() < deadline, f"the tasks did not come to their end: {states}"
        time.sleep(0.1)


@pytest.fixture(name="flow_runs")
def flow_runs_of_this_test(prefect_api: str) -> Callable[[], list[dict[str, Any]]]:
    """Lists the eval runs that began since; the server is shared with other tests."""
    began = datetime.now(UTC)
    return lambda: eval_runs_since(prefect_api, began)


def test_every_hop_of_a_run_is_a_named_task(cli: Cli, prefect_api: str, flow_runs):
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url))
    (run,) = flow_runs()
    assert run["name"] == "coins·stub"
    assert ended_tasks(prefect_api, run, 8) == [(name, "Completed") for name in WHOLE]


def test_a_finished_generation_is_cached_on_resume_and_no_server_is_deployed(cli: Cli, prefect_api: str, flow_runs):
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url))
        (cli.run_dir / "metadata.json").unlink()
        posts = server.stats()["posts"]
        cli("resume", str(cli.run_dir))
        assert server.stats()["posts"] == posts
    _, resumed = flow_runs()
    assert resumed["name"] == "coins·stub"
    assert ended_tasks(prefect_api, resumed, 6) == [
        ("prepare", "Cached"),
        ("replay", "Completed"),
        ("generate", "Cached"),
        ("teardown", "Completed"),
        ("score", "Completed"),
        ("report", "Completed"),
    ]


def test_a_run_killed_while_it_generates_is_prepared_from_the_cache_and_generates_only_the_rest(
    cli: Cli, mark: Mark, prefect_api: str, flow_runs
):
    with upstream(latency=0.3) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--eval.max_concurrent=4"))
        cli.wait_for(lambda: server.stats()["posts"] >= 12, process)
        kill(process)
        assert mark.wait_until_gone() == {}
        in_transit = cli.in_transit(server)
        cli("resume", str(cli.run_dir))
        assert repeated(server) <= in_transit
    _, resumed = flow_runs()
    states = ended_tasks(prefect_api, resumed, 8)
    assert [name for name, _ in states] == WHOLE
    assert dict(states) == {name: "Cached" if name == "prepare" else "Completed" for name in WHOLE}


def test_more_examples_than_the_cached_generation_had_are_generated(cli: Cli, prefect_api: str, flow_runs):
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url, "--eval.num_examples=4"))
        cli("resume", str(cli.run_dir), "--eval.num_examples=10")
        assert server.stats()["posts"] == len(cli.rows()) == 10
    _, resumed = flow_runs()
    assert dict(ended_tasks(prefect_api, resumed, 8))["generate"] == "Completed"
