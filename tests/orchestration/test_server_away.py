"""The Prefect server dies while a run goes on: nothing is lost or paid twice, and its state is right once it is back."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli, finished
from tests.support.installations import on_postgresql_and_redis, on_sqlite
from tests.support.processes import Mark, until
from tests.support.upstream import Upstream

CAUGHT_UP_S = 600.0
BY_ITSELF_S = 45.0
"""Longer than a run needs that waits for nobody, shorter than Prefect's client waits for its server."""


@pytest.mark.parametrize(
    ("kind", "away_s"),
    [
        (on_sqlite, 1),
        pytest.param(on_sqlite, 180, marks=pytest.mark.slow),
        pytest.param(on_postgresql_and_redis, 180, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_prefect_server_is_away_gives_its_model_server_back_in_time_and_says_how_it_ended_later(
    tmp_path: Path, mark: Mark, upstream: Upstream, kind: Any, away_s: float
) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="modal-eval-away-") as folder,  # PostgreSQL's user has to get in
        kind(Path(folder), mark) as server,
    ):
        cli = Cli(tmp_path, mark, "")
        cli.env |= server.variables
        upstream.script(default={"latency": 0.2})
        running = cli.start("run", *cli.arguments(upstream.base_url, "--eval.max_concurrent=1"))
        upstream.wait_for_posts(3, timeout=240)
        server.kill()
        upstream.wait_for_posts(10, timeout=60)
        until((cli.run_dir / "metadata.json").is_file, BY_ITSELF_S)
        gone = time.monotonic() + away_s
        until(lambda: time.monotonic() > gone, away_s + 10)
        assert running.poll() is None, "it could not say how it ended, and left"
        server.start()
        ended = finished(running, expect=0, timeout=CAUGHT_UP_S)
        assert "Traceback" not in ended.stderr
        assert "telling Prefect how it ended" in ended.stderr
        assert upstream.stats()["repeated_after_finish"] == {}
        assert upstream.stats()["posts"] == len(cli.rows()) == 10
        assert server.states("flow_runs") == {"Completed"}
        until(lambda: server.states("task_runs") == {"Completed"}, 120)
