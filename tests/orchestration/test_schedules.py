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
from tests.support.pools import Pool, deploy_busy
from tests.support.processes import Mark, until

AHEAD_S = 60
LATEST_S = 300.0
"""Prefect's quick scheduler looks at what was changed in the last 6 s, and a busy machine may look later; its other one looks
every minute, and has then missed the first run, but not the second."""


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
        schedule = {"interval": AHEAD_S, "anchor_date": due.isoformat(), "timezone": "Europe/Berlin"}
        asked = {"schedule": schedule, "active": True, "parameters": {"folder": str(marks)}}
        server.post(f"deployments/{pool.deployment}/schedules", [asked])
        until(lambda: "Completed" in server.states("flow_runs"), LATEST_S)
        ended = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}, "sort": "EXPECTED_START_TIME_ASC"}
        run = server.post("flow_runs/filter", ended)[0]
        assert run["auto_scheduled"]
        expected = datetime.fromisoformat(run["expected_start_time"])
        assert min(abs((expected - due).total_seconds() - number * AHEAD_S) for number in range(3)) < 1
        assert datetime.fromisoformat(run["start_time"]) >= expected - timedelta(seconds=15)  # workers look ahead
        worker.send_signal(signal.SIGTERM)
        finished(worker, expect=0)
