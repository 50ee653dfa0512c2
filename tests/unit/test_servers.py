"""What is said of servers: prices, costs, ages, and which leases make one server."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from modal_eval import serving
from modal_eval.cli.status import describe
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides, RunConfig
from modal_eval.errors import ConfigError
from modal_eval.processes import OwnedProcess, start_ticks
from modal_eval.records import Lease
from modal_eval.serving import HeldGpus, keeping, sharing
from modal_eval.serving.cleaning import stop_dead
from modal_eval.serving.leases import take_lease, write_lease
from modal_eval.serving.prices import PER_SECOND, VARIABLE, Price, corrections, estimate, per_second, price_of


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv(VARIABLE, raising=False)


def config(infra: dict[str, Any], **vllm: Any) -> RunConfig:
    asked = Overrides.model_validate({"infra": infra, "vllm": vllm})
    return resolve("m", BenchmarkConfig(env_id="toy"), asked)


def lease(lease_id: str, price: Price, hours: float = 2.0, **facts: Any) -> Lease:
    """A lease of this process, as old as `hours`, with `facts` in place of its own."""
    began = (datetime.now(UTC) - timedelta(hours=hours)).isoformat()
    taken = take_lease(
        None, "org/m", lease_id, app=facts.pop("app", ""), kind=facts.pop("kind", "process"), price=price
    )
    made = replace(taken, created_at=began, **facts)
    write_lease(made)
    return made


def test_modals_gpus_have_an_estimate_which_what_the_user_says_replaces():
    assert price_of(config({"target": "modal", "gpu": "H100:2"}, data_parallel_size=2), 2) == Price(
        2, "H100", pytest.approx(2 * 3600 * PER_SECOND["H100"]), True
    )
    said = config({"target": "modal", "gpu": "H100:2", "gpu_hour_price": 3.0}, data_parallel_size=2)
    assert price_of(said, 2) == Price(2, "H100", 6.0, False)


def test_gpus_of_ones_own_are_counted_and_have_no_price_unless_one_is_given():
    assert price_of(config({"target": "node"}), 4) == Price(4, "", None, False)
    assert price_of(config({"target": "node", "gpu_hour_price": 1.5}), 4) == Price(4, "", 6.0, False)
    assert price_of(config({"target": "local", "engine": "llamacpp"}), 0) == Price(0, "")


@pytest.mark.parametrize(
    ("kind", "entry"),
    [("A100", "A100-40GB"), ("a100-80gb", "A100-80GB"), ("H100!", "H100"), ("B200+", "B200"), ("A10G", "A10")],
)
def test_modals_other_names_of_a_gpu_have_its_price(kind, entry):
    assert per_second(kind) == PER_SECOND[entry]


def test_a_type_that_is_not_on_the_list_has_no_price():
    assert estimate("X9000", 2) == Price(2, "X9000", None, False)


def test_the_list_is_corrected_by_a_variable(monkeypatch):
    monkeypatch.setenv(VARIABLE, " H100=0.002 ,X9000=0.5,")
    assert (per_second("H100"), per_second("X9000"), per_second("T4")) == (0.002, 0.5, PER_SECOND["T4"])


@pytest.mark.parametrize("text", ["H100", "H100=", "=1", "H100=-1", "H100=cheap", "H100=nan"])
def test_a_correction_that_cannot_be_read_is_refused_with_the_form(text):
    with pytest.raises(ConfigError, match=f"{VARIABLE}: '{text}' is no TYPE=DOLLARS_A_SECOND"):
        corrections(text)


def test_replicas_of_one_run_are_one_server_whose_costs_add_up():
    for number in range(3):
        lease("abc" if not number else f"abc-{number}", Price(2, "", 5.0), server_pid=os.getpid(), server_started=1.0)
    (server,) = serving.servers()
    assert server.pids == (os.getpid(),) * 3
    assert (server.price.gpus, server.price.an_hour) == (6, 15.0)
    assert server.gpu_hours == pytest.approx(12.0, abs=0.1)
    assert server.cost == pytest.approx(30.0, abs=0.1)
    assert describe(server)["until"] == "its run ends"


def test_runs_that_share_an_app_are_one_server_that_costs_once_and_is_as_old_as_it_says():
    price = Price(2, "H100", 8.0, True)
    lease("a", price, app="modal-eval-m-1", kind="modal", deadline=time.time() + 50)
    later = time.time() + 500
    since = (datetime.now(UTC) - timedelta(hours=4)).isoformat()
    lease("b", price, hours=1, app="modal-eval-m-1", kind="modal", deadline=later, kept=True, since=since)
    (server,) = serving.servers()
    assert (server.name, server.where, server.deadline) == ("modal-eval-m-1", "Modal", later)
    shown = describe(server)
    assert shown["cost"] == pytest.approx(32.0, abs=0.1)
    assert shown["cost_so_far"].startswith("at most $32.0")
    assert shown["cost_so_far"].endswith("(estimate)")
    assert shown["age"] == "4:00"
    assert shown["holder"] == f"pid {os.getpid()} on {os.uname().nodename}, kept"


def test_a_server_without_a_price_tells_its_gpu_hours_and_one_without_gpus_nothing():
    lease("a", Price(4), hours=1.5)
    lease("b", Price(0), hours=1.0)
    assert [describe(server)["cost_so_far"] for server in serving.servers()] == ["6.00 GPU-hours", ""]


def test_a_run_holds_its_servers_gpus_from_when_it_got_them_whether_it_waited_or_came_to_share(tmp_path):
    waited, came_later = tmp_path / "waited", tmp_path / "came-later"
    share = {"app": "vllm-m-1", "kind": "keeper"}
    lease("a", Price(), hours=3, run_dir=str(waited), **share)
    assert serving.held_gpus(waited) is None, "its keeper has no GPU yet"
    first = lease("b", Price(1), hours=2, app="vllm-m-1")
    lease("b-1", Price(1), hours=1.9, app="vllm-m-1")
    late = lease("c", Price(), hours=1, run_dir=str(came_later), **share)
    lease("d", Price(), hours=0.5, run_dir=str(tmp_path), **share, kept=True)
    assert serving.held_gpus(waited) == HeldGpus(2, first.created_at)
    assert serving.held_gpus(came_later) == HeldGpus(2, late.created_at)
    assert serving.held_gpus(tmp_path) is None, "it gave them back and keeps them for others"


def test_why_nobody_has_a_right_to_a_server_is_said():
    lease("a", Price(), holder_pid=1, holder_started=1.0, hours=3)
    lease("b", Price(), deadline=1.0, hours=2)
    lease("c", Price(), app="llamacpp-m-1", kind="keeper", kept=True, server_pid=1, server_started=1.0, hours=1)
    told = [(server.live, server.why_not_live) for server in serving.servers()]
    assert told == [
        (False, "its holder is dead"), (False, "its deadline has passed"), (False, "its keeper is dead"),
    ]  # fmt: skip


def test_of_several_leases_that_keep_a_server_the_longest_stays():
    me = {"server_pid": os.getpid(), "server_started": start_ticks(os.getpid())}
    lease("a", Price(), app="llamacpp-m-1", kind="keeper", kept=True, deadline=time.time() + 900, **me)
    mine = lease("b", Price(), app="llamacpp-m-1", kind="keeper", keep_s=600.0, **me)
    assert sharing.keep(mine).lease_id == "a"
    assert [one.lease_id for one in serving.leases()] == ["a"]
    longer = lease("c", Price(), app="llamacpp-m-1", kind="keeper", keep_s=1800.0, **me)
    assert sharing.keep(longer).lease_id == "c"
    assert [(one.lease_id, one.kept) for one in serving.leases()] == [("c", True)]


def test_only_the_last_lease_that_is_given_back_ends_a_server():
    ended: list[str] = []
    first, second = (lease(name, Price(), app="modal-eval-m-1", kind="modal") for name in ("a", "b"))
    lease("dead", Price(), app="modal-eval-m-1", kind="modal", holder_pid=1, holder_started=1.0)
    assert not sharing.give_back(first, ended.append)
    assert ended == []
    assert sharing.give_back(second, ended.append)
    assert ended == ["modal-eval-m-1"]
    assert serving.leases() == []


def test_the_lease_of_another_account_stays_when_a_server_of_the_same_name_has_ended():
    share = {"app": "modal-eval-m-1", "kind": "modal"}
    theirs = lease("dead", Price(), account="theirs/ci", holder_pid=1, holder_started=1.0, **share)
    mine = lease("a", Price(), account="mine", **share)
    assert serving.clean(modal=False).deeds == []
    assert serving.leases() == [theirs, mine]
    assert sharing.give_back(mine, lambda _: None)
    assert serving.leases() == [theirs]


def test_a_server_that_could_not_be_ended_keeps_its_leases():
    def refuse(_: str) -> None:
        raise OSError("away")

    mine = lease("a", Price(), app="modal-eval-m-1", kind="modal")
    with pytest.raises(OSError, match="away"):
        sharing.give_back(mine, refuse)
    assert [one.lease_id for one in serving.leases()] == ["a"]


def test_the_logs_of_a_server_that_ended_are_removed_after_a_week_and_those_of_others_stay():
    old, fresh, used = (keeping.folder_of(name) for name in ("vllm-old-1", "vllm-fresh-1", "vllm-used-1"))
    for folder in (old, fresh, used):
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "keeper.log").write_text("it was here")
    for folder in (old, used):
        os.utime(folder / "logs" / "keeper.log", (time.time() - 8 * 86400,) * 2)
    lease("a", Price(), app=used.name, kind="keeper")
    assert serving.clean(modal=False).faults == []
    assert (old.exists(), fresh.exists(), used.exists()) == (False, True, True)


def test_a_server_that_somebody_was_given_after_the_first_look_is_not_stopped():
    with OwnedProcess.start(["sleep", "600"]) as process:
        mine = lease("a", Price(), deadline=1.0, server_pid=process.pid, server_started=process.started)
        (seen,) = serving.servers()
        write_lease(replace(mine, deadline=time.time() + 600))
        assert list(stop_dead(seen)) == []
        assert process.poll() is None
        write_lease(mine)
        assert [deed.outcome for deed in stop_dead(seen)] == ["stopped"]
        assert process.wait(30) == -signal.SIGTERM
    assert serving.leases() == []


def test_a_dead_runs_share_in_a_server_that_others_use_is_dropped():
    lease("dead", Price(), app="llamacpp-m-1", kind="keeper", holder_pid=1, holder_started=1.0)
    lease("live", Price(), app="llamacpp-m-1", kind="keeper")
    assert serving.clean(modal=False, dry=True).deeds == []
    assert len(serving.leases()) == 2
    assert serving.clean(modal=False).deeds == []
    assert [one.lease_id for one in serving.leases()] == ["live"]
