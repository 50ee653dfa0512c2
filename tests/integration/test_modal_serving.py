"""Servers on Modal, from the lease to the stop: the real client against a stand-in for Modal on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from modal_eval import serving
from modal_eval.checkpoints.resolve import folder_digest
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides, RunConfig
from modal_eval.errors import ServerError
from modal_eval.records import Lease, PreparedModel, ServerHandle
from modal_eval.serving import modal_app, modal_calls, modal_keys, modal_servers
from modal_eval.serving.leases import write_lease
from modal_eval.serving.prices import estimate
from tests.support.hub import serve_hub
from tests.support.modal_account import BROKEN, COMMIT, FILES, HIDDEN, MODEL, ROOT, SILENT, Account, account_with_vllm

PREPARED = PreparedModel(MODEL, "hub", None, MODEL, COMMIT, None, None, "none", None, 40)


@pytest.fixture(scope="session")
def only_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """One for as long as this process lives, like Modal's client, which remembers whose it is.

    Not one for the module: pytest-xdist may leave it and come back to it.
    """
    with account_with_vllm(tmp_path_factory.mktemp("modal")) as served:
        yield served


@pytest.fixture(scope="module")
def account(only_account: Account) -> Iterator[Account]:
    """What this module's tests and their commands see of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in HIDDEN:
            patch.delenv(name, raising=False)
        for name, value in only_account.variables.items():
            patch.setenv(name, value)
        yield only_account


@pytest.fixture
def modal(account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """The account, seen by a machine of the test's own; what the test deploys is stopped with it."""
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    yield account
    for app in modal_calls.live_apps(modal_app.PREFIX):
        modal_calls.stop(app.name)


def config(infra: dict[str, Any] | None = None, **vllm: Any) -> RunConfig:
    benchmark = BenchmarkConfig(name="toy", env_id="toy")
    return resolve(
        MODEL, benchmark, Overrides.model_validate({"infra": {"target": "modal", **(infra or {})}, "vllm": vllm})
    )


def start(run_dir: Path, wanted: RunConfig | None = None) -> ServerHandle:
    return serving.start_server(wanted or config(), PREPARED, run_dir)


def events(modal: Account, kind: str, app: str | None) -> list[dict[str, Any]]:
    return [event for event in modal.events(kind) if event["name"] == app]


def command(*words: str, expect: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """`modal-eval`, typed on the test's machine."""
    ran = subprocess.run(
        [sys.executable, "-m", "modal_eval.cli", *words], env={**os.environ, "COLUMNS": "200", **variables},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == expect, f"exit {ran.returncode}:\n{ran.stdout}\n{ran.stderr}"
    return ran


def test_two_runs_share_a_warm_server_and_the_last_one_stops_it(modal: Account, tmp_path: Path) -> None:
    first, second = start(tmp_path / "first"), start(tmp_path / "second")
    assert first.base_urls == second.base_urls
    assert first.lease_id != second.lease_id
    assert len(events(modal, "deploy", first.app)) == len(events(modal, "container", first.app)) == 1
    serving.stop_server(first)
    assert events(modal, "stop", first.app) == []
    assert serving.server_exit(second) is None
    serving.stop_server(second)
    assert len(events(modal, "stop", first.app)) == 1
    assert serving.leases() == []
    assert not modal_keys.has_key(str(first.app))


def test_calls_without_the_key_are_refused(modal: Account, tmp_path: Path) -> None:
    handle = start(tmp_path)
    models = f"{handle.base_urls[0]}/models"
    key = os.environ[str(handle.api_key_env)]
    assert httpx.get(models, timeout=60).status_code == 401
    assert httpx.get(models, headers={"Authorization": f"Bearer {key}"}, timeout=60).status_code == 200
    assert key not in handle.to_json()
    serving.stop_server(handle)


def test_a_server_to_be_kept_outlives_its_run_and_later_ones_until_its_deadline(modal: Account, tmp_path: Path) -> None:
    handle = start(tmp_path, config({"keep": 600}))
    serving.stop_server(handle)
    (kept,) = serving.leases()
    assert kept.kept
    assert time.time() + 500 < (kept.deadline or 0) < time.time() + 600
    assert events(modal, "tags", handle.app)[-1]["tags"]["holder"] == "kept"
    serving.stop_server(start(tmp_path / "second"))
    assert events(modal, "stop", handle.app) == []
    assert serving.clean().deeds == []
    write_lease(replace(kept, deadline=time.time() - 1))
    assert [deed.server for deed in serving.clean().deeds] == [handle.app]
    assert len(events(modal, "deploy", handle.app)) == len(events(modal, "stop", handle.app)) == 1


def test_status_tells_the_age_and_the_cost_of_a_server(modal: Account, tmp_path: Path) -> None:
    handle = start(tmp_path, config({"gpu": "H100:2", "gpu_hour_price": 3.0}, data_parallel_size=2))
    (lease,) = serving.leases()
    began = datetime.now(UTC) - timedelta(minutes=90)
    write_lease(replace(lease, created_at=began.isoformat(timespec="seconds")))
    (shown,) = json.loads(command("status", "--json").stdout)
    assert shown["age"] == "1:30"
    assert shown["cost"] == pytest.approx(9.0, abs=0.1)
    assert shown["holder"] == f"pid {os.getpid()} on {socket.gethostname()}"
    serving.stop_server(handle)


HOLDER = """if True:
    import pathlib, sys
    from modal_eval import serving
    from tests.integration.test_modal_serving import PREPARED, config
    print(serving.start_server(config(), PREPARED, pathlib.Path(sys.argv[1])).app, flush=True)
    sys.stdin.read()
    """


def left_by_a_killed_run(run_dir: Path) -> Lease:
    """The lease of a server whose holder got `kill -9`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith("modal-eval-org-tiny")
        (lease,) = serving.leases()
        assert serving.is_live(lease)
        holder.kill()
    assert not serving.is_live(lease)
    return lease


def test_a_killed_runs_server_is_taken_over_by_the_next_run_of_its_kind(modal: Account, tmp_path: Path) -> None:
    lease = left_by_a_killed_run(tmp_path / "killed")
    handle = start(tmp_path / "next")
    assert handle.app == lease.app
    assert [one.lease_id for one in serving.leases()] == [handle.lease_id]
    serving.stop_server(handle)
    assert len(events(modal, "deploy", lease.app)) == len(events(modal, "stop", lease.app)) == 1


def test_a_killed_runs_server_is_shown_and_stopped_by_hand(modal: Account, tmp_path: Path) -> None:
    lease = left_by_a_killed_run(tmp_path / "killed")
    (shown,) = json.loads(command("status", "--json").stdout)
    assert shown["app"] == lease.app
    assert shown["holder"] == "nobody: its holder is dead"
    assert lease.app in command("stop").stderr
    assert len(events(modal, "stop", lease.app)) == 1
    assert json.loads(command("status", "--json").stdout) == []


def test_a_killed_runs_server_in_another_account_is_left_to_that_account(modal: Account, tmp_path: Path) -> None:
    lease = left_by_a_killed_run(tmp_path / "killed")
    assert "ak-test" not in json.dumps(asdict(lease))
    with account_with_vllm(tmp_path / "other") as other:
        own_login = {**other.variables, "MODAL_TOKEN_ID": "ak-of-this-worker"}
        (deed,) = json.loads(command("stop", "--json", **own_login).stdout)
        assert (deed["server"], deed["outcome"]) == (lease.app, "left alone")
        assert "deployed under another login" in command("stop", **own_login).stderr
        assert "deployed under another login" in command("stop", "--all", expect=1, **own_login).stderr
        assert serving.leases() == [lease]
        assert modal_keys.has_key(lease.app)
        write_lease(replace(lease, deadline=time.time() - 2 * 86400))
        assert f"stopped: {lease.app}" in command("stop", **own_login).stderr, "it has had no GPU for long"
        assert serving.leases() == []
    write_lease(lease)
    assert events(modal, "stop", lease.app) == []
    assert f"stopped: {lease.app}" in command("stop").stderr
    assert len(events(modal, "stop", lease.app)) == 1


def test_a_killed_runs_server_is_stopped_by_another_login_to_its_account(modal: Account, tmp_path: Path) -> None:
    lease = left_by_a_killed_run(tmp_path / "killed")
    assert f"stopped: {lease.app}" in command("stop", MODAL_TOKEN_ID="ak-second").stderr
    assert len(events(modal, "stop", lease.app)) == 1
    assert serving.leases() == []


def test_an_app_whose_lease_is_gone_is_found_by_its_tags(modal: Account, tmp_path: Path) -> None:
    lease = left_by_a_killed_run(tmp_path / "killed")
    (tmp_path / "state" / "leases" / f"{lease.lease_id}.json").unlink()
    (orphan,) = serving.orphans()
    assert (orphan.app, orphan.ours, orphan.may_stop) == (lease.app, True, True)
    assert orphan.serves(MODEL)
    assert orphan.price == estimate("A100-80GB", 1)
    write_lease(lease)
    assert not serving.stop_orphan(orphan), "somebody has come to share it meanwhile"
    (tmp_path / "state" / "leases" / f"{lease.lease_id}.json").unlink()
    assert json.loads(command("status", "--json").stdout)[0]["holder"] == "nobody: no lease of it is left"
    assert "`modal-eval stop` ends" in command("status").stderr
    assert lease.app in command("stop").stderr
    assert serving.orphans() == []


def test_another_machines_app_is_shown_and_left_alone_until_its_deadline(
    modal: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = start(tmp_path)
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "another-machine"))
    (orphan,) = serving.orphans()
    assert (orphan.app, orphan.ours, orphan.may_stop) == (theirs.app, False, False)
    assert json.loads(command("status", "--json").stdout)[0]["holder"].startswith("another machine")
    command("stop", "--all")
    assert events(modal, "stop", theirs.app) == []
    modal_calls.set_tags(str(theirs.app), {"tool": "modal-eval", "owner": "them", "deadline": "1"})
    assert str(theirs.app) in command("stop").stderr
    assert len(events(modal, "stop", theirs.app)) == 1


def test_a_run_that_keeps_a_shared_server_takes_no_time_from_those_who_still_use_it(
    modal: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = config({"keep": 1, "lifetime": 7200})
    first, second = start(tmp_path / "first", kept), start(tmp_path / "second", kept)
    assert first.app == second.app
    serving.stop_server(first)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "another-machine"))
        (orphan,) = serving.orphans()
        assert (orphan.deadline or 0) > time.time() + 3600
        assert second.lease_id in orphan.holder
    serving.stop_server(second)
    (app,) = modal_calls.live_apps(str(second.app))
    assert (app.tags["holder"], (app.deadline or 0) < time.time() + 3600) == ("kept", True)


def test_a_run_whose_server_somebody_stopped_is_told_so(modal: Account, tmp_path: Path) -> None:
    handle = start(tmp_path)
    command("stop", "-m", MODEL)
    assert "stopped by somebody else" in str(serving.server_exit(handle))
    serving.stop_server(handle)  # once more does no harm
    assert len(events(modal, "stop", handle.app)) == 1


def test_a_modal_that_is_silent_at_the_end_fails_no_run_and_the_next_sweep_stops_the_server(
    modal: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = start(tmp_path)
    os.kill(modal.pid, signal.SIGSTOP)
    try:
        with monkeypatch.context() as impatient:
            impatient.setattr(modal_calls, "ASK_S", 1.0)
            impatient.setattr(modal_calls, "LOGS_S", 1.0)
            serving.stop_server(handle)
    finally:
        os.kill(modal.pid, signal.SIGCONT)
    (lease,) = serving.leases()
    assert not serving.is_live(lease)
    assert [deed.server for deed in serving.clean().deeds] == [handle.app]
    assert events(modal, "stop", handle.app) != []
    assert serving.leases() == []


def checkpoint(folder: Path) -> PreparedModel:
    """A folder of a training run, with what no server needs beside its weights."""
    folder.mkdir(parents=True)
    for name, content in {**FILES, "optimizer.bin": b"large", "logs.csv": b"1,2"}.items():
        (folder / name).write_bytes(content)
    digest = folder_digest(folder)
    return PreparedModel(str(folder), "folder", folder, "run_step40", None, digest, None, "none", None, 40)


def test_a_checkpoint_of_this_machine_is_uploaded_once_without_what_no_server_needs(
    modal: Account, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path / "run_step40")
    for length in (8192, 9000):  # two servers, one checkpoint
        plan = modal_app.plan(config(max_model_len=length), model)
        lease = modal_servers.acquire(plan, model.model_id, tmp_path, say=lambda _: None)
        modal_servers.release(lease)
    sent = [event for event in modal.events("upload") if "run_step40" in event["files"][0]]
    place = plan.command[2].removeprefix("/modal-eval/checkpoints")
    assert place.startswith("/run_step40-")
    assert [event["files"] for event in sent] == [[f"{place}/{name}" for name in sorted(FILES)], [f"{place}.complete"]]
    assert str(tmp_path) not in "".join(plan.command)
    assert "--revision" not in plan.command


def test_a_container_that_fails_is_told_with_its_last_words_and_nothing_is_left(modal: Account, tmp_path: Path) -> None:
    broken = config(quantization=BROKEN[1])
    with pytest.raises(
        ServerError, match=r"does not start \(HTTP 500\)(.|\n)*No available memory(.|\n)*vLLM exited with 1"
    ):
        start(tmp_path, broken)
    name = modal_app.plan(broken, PREPARED).name
    assert len(events(modal, "stop", name)) == 1
    assert serving.leases() == []


def test_a_start_beyond_its_limit_is_given_up_and_stopped(modal: Account, tmp_path: Path) -> None:
    slow = config({"startup_timeout": 1}, quantization=SILENT[1])
    with pytest.raises(ServerError, match="did not answer within infra.startup_timeout=1 s and was given back"):
        start(tmp_path, slow)
    assert len(events(modal, "stop", modal_app.plan(slow, PREPARED).name)) == 1
    assert serving.leases() == []


def test_a_secret_that_the_account_lacks_is_named_with_the_way_to_make_it(modal: Account, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"a secret is missing .*Secret 'none'.*modal secret create") as refused:
        start(tmp_path, config({"secrets": ["none"]}))
    assert "\n" not in str(refused.value)
    assert serving.leases() == []
    serving.stop_server(start(tmp_path, config({"secrets": "[]"})))


def test_a_lost_key_is_made_anew_with_the_server(modal: Account, tmp_path: Path) -> None:
    handle = start(tmp_path, config({"keep": 600}))
    key = os.environ[str(handle.api_key_env)]
    modal_keys.forget(str(handle.app))
    again = start(tmp_path / "again")
    assert again.app == handle.app
    assert os.environ[str(again.api_key_env)] != key
    assert len(events(modal, "deploy", handle.app)) == 2


def test_modals_own_command_and_ours_deploy_the_same_app_and_runs_leave_it(modal: Account, tmp_path: Path) -> None:
    with serve_hub(COMMIT, {MODEL: FILES}) as hub:
        given = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
            "MODAL_EVAL_MODEL": MODEL, "MODAL_EVAL_BENCHMARK": "gsm8k",
        }  # fmt: skip
        alone = subprocess.run(
            [sys.executable, "-m", "modal", "deploy", "deployments/modal_vllm.py"], cwd=ROOT,
            env={**os.environ, **given}, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert alone.returncode == 0, alone.stdout + alone.stderr
        (app,) = serving.orphans()
        assert not app.may_stop
        assert "Nothing to stop" in command("stop").stderr
        told = json.loads(command("deploy", "--json", **given).stdout)
    assert told["app"] == app.app
    assert len(events(modal, "deploy", app.app)) == 1
    assert command("stop").returncode == 0
    assert events(modal, "stop", app.app) == []
    answer = httpx.get(
        f"{told['url']}/models", headers={"Authorization": f"Bearer {Path(told['key_file']).read_text()}"}, timeout=60
    )
    assert answer.json()["data"][0]["id"] == MODEL
    command("stop", "-m", MODEL, "-b", "math500")
    assert events(modal, "stop", app.app) == []
    command("stop", "-m", MODEL, "-b", "gsm8k")
    assert len(events(modal, "stop", app.app)) == 1


@pytest.mark.parametrize("name", ["MODAL_EVAL_MODEL", "MODAL_EVAL_BENCHMARK"])
def test_modals_own_command_asks_for_what_it_needs(name: str) -> None:
    given = {"MODAL_EVAL_MODEL": MODEL, "MODAL_EVAL_BENCHMARK": "gsm8k", name: ""}
    ran = subprocess.run(
        [sys.executable, "-c", "import deployments.modal_vllm"], cwd=ROOT, env={**os.environ, **given},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert f"{name} must say what to deploy" in ran.stderr.splitlines()[-1]
