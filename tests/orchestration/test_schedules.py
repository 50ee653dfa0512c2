"""A schedule brings its runs: with the versions of other packages that were locked, Prefect's scheduler works."""

from __future__ import annotations

import signal
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli, finished
from tests.support.installations import on_postgresql_and_redis, on_sqlite
from tests.support.pools import Pool, deploy_busy, is_there
from tests.support.processes import Mark, until

AHEAD_S = 60


@pytest.mark.parametrize("kind", [on_sqlite, pytest.param(on_postgresql_and_redis, marks=pytest.mark.slow)])
def test_a_run_that_is_scheduled_a_minute_ahead_is_made_starts_then_and_ends(
    tmp_path: Path, mark: Mark, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="modal-eval-schedules-") as folder,  # PostgreSQL's user has to get in
        kind(Path(folder), mark) as server,
    ):
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        cli = Cli(tmp_path, mark, "")
        cli.env |= server.variables
        pool = Pool(cli, deploy_busy(server.variables["PREFECT_API_URL"]))
        worker = pool.worker()
        marks = tmp_path / "scheduled"
        marks.mkdir()
        (marks / "enough").touch()
        due = datetime.now(UTC) + timedelta(seconds=AHEAD_S)
        schedule = {"interval": 86400, "anchor_date": due.isoformat(), "timezone": "Europe/Berlin"}
        asked = {"schedule": schedule, "active": True, "parameters": {"folder": str(marks)}}
        server.post(f"deployments/{pool.deployment}/schedules", [asked])
        is_there(marks / "working")
        until(lambda: "Completed" in server.states("flow_runs"), 120)
        (run,) = server.post("flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}})
        assert run["auto_scheduled"]
        assert abs(datetime.fromisoformat(run["expected_start_time"]) - due) < timedelta(seconds=1)
        assert datetime.fromisoformat(run["start_time"]) >= due - timedelta(seconds=15)  # workers look ahead
        worker.send_signal(signal.SIGTERM)
        finished(worker, expect=0)
