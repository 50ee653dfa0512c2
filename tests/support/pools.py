"""A work pool with a deployment of the busy flow of `tests/fixtures/flows`, for tests of workers."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

from tests.support.cli import Cli
from tests.support.prefect_server import ask, get, post
from tests.support.processes import until

FLOWS = Path(__file__).parents[1] / "fixtures" / "flows"
WITHIN_S = 300.0
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
        user, _, password = cli.env.get("PREFECT_API_AUTH_STRING", ":").partition(":")
        self._auth = (user, password)
        self.deployment = get(f"{self.api}/deployments/name/busy/{name}", self._auth)["id"]

    def schedule(self, name: str, **parameters) -> tuple[str, Path]:
        """A flow run, and the folder in which it leaves its marks."""
        folder = self.cli.folder / name
        folder.mkdir()
        asked = {"parameters": {"folder": str(folder), **parameters}, "state": {"type": "SCHEDULED"}}
        url = f"{self.api}/deployments/{self.deployment}/create_flow_run"
        return post(url, asked, self._auth)["id"], folder

    def state(self, flow_run: str) -> str:
        return get(f"{self.api}/flow_runs/{flow_run}", self._auth)["state"]["name"]

    def forget(self, flow_run: str) -> None:
        ask("DELETE", f"{self.api}/flow_runs/{flow_run}", auth=self._auth)

    def worker(self, *arguments: str) -> subprocess.Popen[str]:
        process = self.cli.start("worker", "--pool", self.name, "--name", self.name, *arguments)
        first = process.stdout.readline()
        assert f"worker {self.name} serves {self.name}" in first, first + process.stderr.read()
        return process


def deploy_busy(api_url: str) -> str:
    """Make a pool and the deployment; returns the name of both."""
    name = f"pool-{uuid.uuid4().hex[:8]}"
    env = {**os.environ, "PREFECT_API_URL": api_url}
    subprocess.run([sys.executable, "-c", DEPLOY, str(FLOWS), name], env=env, check=True, timeout=300)
    return name


def is_there(path: Path) -> None:
    """Wait for a mark of the busy flow."""
    until(path.is_file, WITHIN_S)
