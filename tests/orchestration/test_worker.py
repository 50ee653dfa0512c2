"""Our worker on a real Prefect server: its flows come to an end of their own. `test_nodes.py` kills and drains one."""

import signal

import pytest

from modal_eval.cli.worker import alone
from modal_eval.errors import ConfigError
from modal_eval.processes import OwnedProcess
from tests.support.cli import Cli, finished
from tests.support.leases import server_of
from tests.support.pools import Pool, deploy_busy, is_there
from tests.support.processes import Mark, until
from tests.support.relay import relay

TRIES = 24
"""Connections that find nobody; Prefect's own worker gives up after twelve polls, and ends its flows."""


def test_a_stopped_worker_lets_its_flows_give_back_what_they_hold_and_kills_the_one_that_does_not_end(
    cli: Cli, prefect_api: str, mark: Mark
):
    pool = Pool(cli, deploy_busy(prefect_api))
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


def test_a_worker_and_its_run_outlast_a_server_that_is_away(cli: Cli, prefect_api: str):
    name = deploy_busy(prefect_api)
    with relay(prefect_api.removesuffix("/api")) as between:
        pool = Pool(cli, name)
        cli.env |= {"PREFECT_API_URL": f"{between.url}/api", "PREFECT_WORKER_QUERY_SECONDS": "0.3"}
        process = pool.worker()
        first, folder = pool.schedule("first")
        is_there(folder / "working")
        between.shut = True
        until(lambda: between.refused >= TRIES, 240)
        between.shut = False
        (folder / "enough").touch()
        until(lambda: pool.state(first) == "Completed", 120)
        second, folder = pool.schedule("second")
        is_there(folder / "working")
        (folder / "enough").touch()
        until(lambda: pool.state(second) == "Completed", 120)
        process.send_signal(signal.SIGTERM)
        finished(process, expect=0)


def test_a_worker_ends_what_dead_runs_left_on_its_machine(cli: Cli, prefect_api: str, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", cli.env["MODAL_EVAL_STATE_DIR"])
    with OwnedProcess.start(["sleep", "600"]) as dead, OwnedProcess.start(["sleep", "600"]) as live:
        server_of("dead", dead, holder_pid=1, holder_started=1.0)
        server_of("live", live)
        worker = Pool(cli, deploy_busy(prefect_api)).worker()
        assert dead.wait(120) == -signal.SIGTERM
        assert live.poll() is None
        worker.send_signal(signal.SIGTERM)
        assert f"stopped: pid {dead.pid}" in finished(worker, expect=0).stdout


def test_a_machine_has_one_worker_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path))
    with (
        alone("node-a", "a100"),
        pytest.raises(ConfigError, match="a worker called node-a runs on this machine already.*a100"),
        alone("node-a", "modal"),
    ):
        pass
    with alone("node-a", "modal") as path:
        assert "modal" in path.read_text()
