"""Our worker on a real Prefect server: its flows come to an end of their own, whichever way it ends."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from tests.support.cli import Cli, finished
from tests.support.processes import Mark, until

FLOWS = Path(__file__).parents[1] / "fixtures" / "flows"
WITHIN_S = 120.0
DEPLOY = """if True:
    import sys
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.workers.process import ProcessWorker
    source, pool = sys.argv[1:]
    with get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
    flow.from_source(source=source, entrypoint="busy.py:busy").deploy(
        name=pool, work_pool_name=pool, build=False, push=False, print_next_steps=False
    )
"""


class Pool:
    """A work pool with a deployment of the busy flow, and workers that serve it."""

    def __init__(self, cli: Cli, name: str) -> None:
        self.cli = cli
        self.name = name
        self.api = cli.env["PREFECT_API_URL"]
        cli.env |= {"PREFECT_WORKER_QUERY_SECONDS": "1"}
        found = httpx.get(f"{self.api}/deployments/name/busy/{name}", timeout=30).raise_for_status().json()
        self.deployment = found["id"]

    def schedule(self, name: str, **parameters) -> tuple[str, Path]:
        """A flow run, and the folder in which it leaves its marks."""
        folder = self.cli.folder / name
        folder.mkdir()
        asked = {"parameters": {"folder": str(folder), **parameters}, "state": {"type": "SCHEDULED"}}
        made = httpx.post(f"{self.api}/deployments/{self.deployment}/create_flow_run", json=asked, timeout=30)
        return made.raise_for_status().json()["id"], folder

    def state(self, flow_run: str) -> str:
        return httpx.get(f"{self.api}/flow_runs/{flow_run}", timeout=30).raise_for_status().json()["state"]["name"]

    def worker(self, *arguments: str) -> subprocess.Popen[str]:
        process = self.cli.start("worker", "--pool", self.name, "--name", self.name, *arguments)
        first = process.stdout.readline()
        assert f"worker {self.name} serves {self.name}" in first, first + process.stderr.read()
        return process


@pytest.fixture(scope="module")
def deployed(prefect_api: str) -> str:
    """The name of a work pool and of the deployment in it."""
    name = f"pool-{uuid.uuid4().hex[:8]}"
    env = {**os.environ, "PREFECT_API_URL": prefect_api}
    subprocess.run([sys.executable, "-c", DEPLOY, str(FLOWS), name], env=env, check=True, timeout=300)
    return name


@pytest.fixture
def pool(cli: Cli, deployed: str) -> Pool:
    return Pool(cli, deployed)


def is_there(path: Path) -> None:
    until(path.is_file, WITHIN_S)


def test_a_stopped_worker_lets_its_flows_give_back_what_they_hold_and_kills_the_one_that_does_not_end(
    pool: Pool, mark: Mark
):
    gentle, gentle_folder = pool.schedule("gentle")
    stubborn, stubborn_folder = pool.schedule("stubborn", stubborn=True)
    process = pool.worker("--grace=15")
    is_there(gentle_folder / "working")
    is_there(stubborn_folder / "working")
    process.send_signal(signal.SIGTERM)
    is_there(gentle_folder / "given back")
    ended = finished(process, expect=0)
    assert (gentle_folder / "hook").is_file()
    assert (stubborn_folder / "giving back").is_file()
    assert "it did not end in 15 s" in ended.stdout
    assert mark.wait_until_gone() == {}
    assert pool.state(gentle) == pool.state(stubborn) == "Crashed"


def test_the_flows_of_a_killed_worker_end_at_once_and_leave_nothing(pool: Pool, mark: Mark):
    flow_run, folder = pool.schedule("orphan")
    process = pool.worker()
    is_there(folder / "working")
    process.kill()
    process.communicate()
    is_there(folder / "given back")
    assert mark.wait_until_gone() == {}
    until(lambda: pool.state(flow_run) == "Crashed", WITHIN_S)


def test_a_draining_worker_finishes_what_runs_and_takes_nothing_more(pool: Pool):
    running, folder = pool.schedule("running")
    process = pool.worker()
    is_there(folder / "working")
    second = finished(pool.cli.start("worker", "--pool", pool.name, "--name", pool.name), expect=2)
    assert f"a worker called {pool.name} runs on this machine already" in second.stderr
    process.send_signal(signal.SIGUSR1)
    assert "takes nothing more; 1 runs to end" in process.stdout.readline()
    late, _ = pool.schedule("late")
    (folder / "enough").touch()
    finished(process, expect=0)
    assert (pool.state(running), pool.state(late)) == ("Completed", "Scheduled")
    httpx.delete(f"{pool.api}/flow_runs/{late}", timeout=30).raise_for_status()
