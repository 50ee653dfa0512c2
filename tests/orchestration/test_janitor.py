"""The janitor as a flow, against a real Prefect server, real processes, and a stand-in for Modal on loopback."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modal_eval import serving
from modal_eval.processes import OwnedProcess
from tests.support.gpus import Machine, sleeper
from tests.support.leases import server_of
from tests.support.modal_account import HIDDEN, Account, account
from tests.support.prefect_server import post
from tests.support.processes import Mark

ROOT = Path(__file__).resolve().parents[2]
FLOW = """if True:
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from flows.janitor import janitor
    from modal_eval.config.janitor import JanitorRequest
    from modal_eval.serving import modal_calls
    modal_calls.ASK_S = float(sys.argv[3])
    state = janitor(JanitorRequest.model_validate_json(sys.argv[2]), return_state=True)
    print(json.dumps([state.type.value, state.message, state.result(raise_on_failure=False)], default=str))
    """
APP = """if True:
    import modal, sys
    app = modal.App.lookup(sys.argv[1], create_if_missing=True)
    app.set_tags(dict(word.split("=") for word in sys.argv[2:]))
    """


class House:
    """A machine with its own state, GPUs and account on Modal, whose janitor runs in a process of its own."""

    def __init__(self, folder: Path, modal: Account, machine: Machine, prefect_api: str, mark: Mark) -> None:
        self.modal = modal
        self.prefect_api = prefect_api
        self.env = {name: value for name, value in machine.env(mark.env).items() if name not in HIDDEN}
        self.env |= {
            **modal.variables, "MODAL_EVAL_STATE_DIR": str(folder / "state"), "PREFECT_API_URL": prefect_api,
            "PREFECT_HOME": str(folder / "prefect"),
        }  # fmt: skip

    def janitor(self, patience_s: float = 30.0, **request: Any) -> tuple[str, str, Any]:
        """State, message and result of one run of the flow, which waits so long for each answer of Modal."""
        words = [sys.executable, "-c", FLOW, str(ROOT), json.dumps(request), str(patience_s)]
        ran = subprocess.run(words, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert ran.returncode == 0, ran.stderr
        state, message, result = json.loads(ran.stdout.splitlines()[-1])
        return state, message, result

    def table(self) -> list[dict[str, Any]]:
        """The newest table that the janitor has published."""
        query = {"artifacts": {"key": {"any_": ["janitor"]}}, "sort": "CREATED_DESC", "limit": 1}
        (found,) = post(f"{self.prefect_api}/artifacts/filter", query)
        rows: list[dict[str, Any]] = json.loads(found["data"])
        return rows

    def app(self, name: str, **tags: str) -> None:
        """An app on Modal that says `tags` of itself."""
        words = [sys.executable, "-c", APP, name, "tool=modal-eval", *(f"{key}={value}" for key, value in tags.items())]
        subprocess.run(words, env=self.env, check=True, timeout=120)

    def stopped(self) -> list[str]:
        return [event["name"] for event in self.modal.events("stop")]


@pytest.fixture
def house(
    tmp_path: Path, machine: Machine, mark: Mark, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[House]:
    with account(tmp_path / "modal") as modal:
        made = House(tmp_path, modal, machine, prefect_api, mark)
        monkeypatch.setenv("MODAL_EVAL_STATE_DIR", made.env["MODAL_EVAL_STATE_DIR"])
        yield made


def test_the_janitor_stops_what_nobody_has_a_right_to_and_publishes_it(house: House, machine: Machine) -> None:
    leftover = sleeper({**house.env, "MODAL_EVAL_GPU_LEASE": f"{machine.leases.path}:gone:1:1"})
    try:
        with (
            OwnedProcess.start(["sleep", "600"]) as dead,
            OwnedProcess.start(["sleep", "600"]) as late,
            OwnedProcess.start(["sleep", "600"]) as live,
        ):
            server_of("dead", dead, holder_pid=1, holder_started=1.0)
            server_of("late", late, deadline=time.time() - 1)
            server_of("live", live)
            house.app("modal-eval-late-1", owner="them", holder="them", deadline="1", gpus="1.H100", model="org-late")
            house.app("modal-eval-live-1", owner="them", holder="them", deadline=f"{time.time() + 999:.0f}", model="x")
            told = house.janitor(dry_run=True)[2]
            assert {row["outcome"] for row in told} == {"would be stopped"}
            assert dead.poll() is late.poll() is None
            state, _, rows = house.janitor()
            assert state == "COMPLETED"
            here = socket.gethostname()
            assert {(row["server"], row["where"], row["reason"]) for row in rows} == {
                (f"pid {dead.pid}", here, "its holder is dead"),
                (f"pid {late.pid}", here, "its deadline has passed"),
                ("modal-eval-late-1", "Modal", "its deadline has passed"),
                (f"pid {leftover.pid}", here, "the holder of its GPU is dead"),
            }
            assert {row["outcome"] for row in rows} == {"stopped"}
            assert house.table() == rows
            assert (dead.wait(30), late.wait(30), live.poll()) == (-signal.SIGTERM, -signal.SIGTERM, None)
        assert leftover.wait(30) == -signal.SIGTERM
        assert house.stopped() == ["modal-eval-late-1"]
        assert [lease.lease_id for lease in serving.leases()] == ["live"]
    finally:
        leftover.kill()
        leftover.wait()


def test_a_fault_at_one_server_keeps_the_janitor_from_no_other_and_fails_its_run(house: House) -> None:
    house.env |= {"MODAL_SERVER_URL": "http://127.0.0.1:9"}  # nobody listens there
    with OwnedProcess.start(["sleep", "600"]) as first, OwnedProcess.start(["sleep", "600"]) as second:
        server_of("a", first, kind="modal", app="modal-eval-lost-1", deadline=1.0)
        server_of("b", second, deadline=1.0)
        state, message, _ = house.janitor(patience_s=1)
        assert state == "FAILED"
        assert "modal-eval-lost-1 on Modal stays for now: Modal does not stop modal-eval-lost-1" in message
        assert second.wait(30) == -signal.SIGTERM
        outcomes = {row["server"]: row["outcome"] for row in house.table() if "server" in row}
        assert outcomes == {"modal-eval-lost-1": "not stopped", f"pid {second.pid}": "stopped"}
        (unseen,) = [row["fault"] for row in house.table() if row["outcome"] == "fault"]
        assert unseen.startswith("Modal was not looked at: ")
    assert [lease.lease_id for lease in serving.leases()] == ["a"]
