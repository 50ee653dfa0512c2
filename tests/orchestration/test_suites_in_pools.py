"""A suite's benchmark as a flow run of its deployment, on a real Prefect server; the test is the worker."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from modal_eval.config.models import Overrides
from modal_eval.errors import SuiteError
from modal_eval.stages.suites import Entry, Outcome, Suite
from tasks.artifacts import packed
from tasks.suite import evaluate
from tests.support.prefect_server import post
from tests.support.processes import until

WITHIN_S = 60.0


class Worked:
    """The one flow run of a benchmark, asked for by a suite and worked on by hand."""

    def __init__(self, api: str, folder: Path) -> None:
        self.api = api
        self.name = f"coins-{uuid.uuid4().hex[:8]}"
        flow = post(f"{api}/flows/", {"name": "eval"})["id"]
        self.deployment = post(f"{api}/deployments/", {"name": self.name, "flow_id": flow})["id"]
        entry = Entry(self.name, self.name, "0", Overrides(), "a server", one_at_a_time=False)
        self.suite = Suite(folder / self.name, "mine", "org/m", "", (entry,))

    def evaluate(self) -> Outcome:
        with temporary_settings({PREFECT_API_URL: self.api}):
            return evaluate.fn(self.suite, self.suite.entries[0], "pools")

    def complete(self, state_before: str, outcome: dict[str, Any] | None = None) -> None:
        """End the flow run once it waits for a worker."""
        until(lambda: self.flow_run()["state_name"] == state_before, WITHIN_S)
        run = self.flow_run()["id"]
        if outcome:
            made = {"key": "result-coins", "type": "table", "data": "[]", "metadata_": packed(outcome)}
            post(f"{self.api}/artifacts/", {**made, "flow_run_id": run})
        post(f"{self.api}/flow_runs/{run}/set_state", {"state": {"type": "COMPLETED"}, "force": True})

    def flow_run(self) -> dict[str, Any]:
        found = post(f"{self.api}/flow_runs/filter", {"deployments": {"id": {"any_": [self.deployment]}}})
        return found[0] if found else {"state_name": "none"}


@pytest.fixture
def worked(prefect_api: str, tmp_path: Path) -> Worked:
    return Worked(prefect_api, tmp_path)


def test_a_run_that_is_completed_and_has_published_no_result_is_tried_again_once(worked: Worked):
    with ThreadPoolExecutor() as pool:
        evaluating = pool.submit(worked.evaluate)
        worked.complete("Scheduled")
        worked.complete("AwaitingRetry", {"status": "complete", "avg_reward": 0.5})
        outcome = evaluating.result(WITHIN_S)
    assert (outcome["benchmark"], outcome["status"], outcome["avg_reward"]) == (worked.name, "complete", 0.5)
    assert outcome["flow_run_id"] == worked.flow_run()["id"]


def test_a_run_that_publishes_no_result_the_second_time_either_fails_its_benchmark(worked: Worked):
    with ThreadPoolExecutor() as pool:
        evaluating = pool.submit(worked.evaluate)
        worked.complete("Scheduled")
        worked.complete("AwaitingRetry")
        with pytest.raises(SuiteError, match="has published no result, nor when it was tried again"):
            evaluating.result(WITHIN_S)
