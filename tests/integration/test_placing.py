"""`infra.target=auto`: this machine's GPUs while some are free in time, Modal otherwise.

Stand-ins are the driver, Modal's side of the wire and the vLLM in both places; leases, locks, deployments and the flow are
ours, and real.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from modal_eval import gpus
from tests.support.checkpoints import checkpoint
from tests.support.cli import Cli
from tests.support.gpus import Machine
from tests.support.hub import Hub, serve_hub
from tests.support.modal_account import COMMIT, FILES, HIDDEN, MODEL, account_with_vllm
from tests.support.vllm_environment import vllm_environment


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub(COMMIT, {MODEL: {**FILES, **checkpoint({"model.safetensors": ("a",)})}}) as served:
        yield served


@pytest.fixture
def node(cli: Cli, hub: Hub, machine: Machine) -> Cli:
    """A node with a Hub in reach."""
    vllm_environment(cli.folder / "vllm")
    cli.env = {name: value for name, value in cli.env.items() if name not in HIDDEN}
    cli.env |= {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(cli.folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        "MODAL_CONFIG_PATH": str(cli.folder / "none.toml"),
    }  # fmt: skip
    cli.env = machine.env(cli.env)
    return cli


def run(cli: Cli, *more: str, expect: int = 0) -> str:
    words = ["run", "-m", MODEL, "-b", cli.benchmark(), "--infra.target=auto", "--run-dir", str(cli.run_dir)]
    ran = cli(*words, f"--infra.environment={cli.folder / 'vllm'}", *more, expect=expect)
    return ran.stdout + ran.stderr


def deployed(cli: Cli) -> str | None:
    app = json.loads((cli.run_dir / "run_config.json").read_text())["app_name"]
    assert app is None or isinstance(app, str)
    return app


def test_a_free_gpu_of_this_machine_is_taken_and_modal_is_not_asked(node: Cli, machine: Machine):
    with account_with_vllm(node.folder / "modal") as modal:
        node.env |= modal.variables
        run(node)
        assert len(node.rows()) == 10
        assert deployed(node) is None
        assert modal.events("AppPublish") == []
    assert "leased GPU 0" in (node.run_dir / "logs" / "flow.log").read_text()
    assert machine.leased() == []


@pytest.mark.parametrize(
    ("count", "why"), [("1", "no GPU after 1 s"), ("0", "this machine has no NVIDIA GPU")], ids=["busy", "none"]
)
def test_where_no_gpu_comes_free_in_time_or_none_is_there_the_server_goes_to_modal(
    node: Cli, machine: Machine, monkeypatch: pytest.MonkeyPatch, count: str, why: str
):
    machine.set("count", count)
    machine.enter(monkeypatch)
    held = gpus.take(run="somebody else") if count == "1" else None
    try:
        with account_with_vllm(node.folder / "modal") as modal:
            node.env |= modal.variables
            run(node, "--infra.gpu_wait=1")
            assert len(node.rows()) == 10
            assert deployed(node) is not None
            assert modal.events("request") != []
    finally:
        if held:
            held.release()
    log = (node.run_dir / "logs" / "flow.log").read_text()
    assert why in log
    assert "so it goes to Modal (A100-80GB)" in log


def test_without_an_account_on_modal_it_is_said_what_is_missing_here(node: Cli, machine: Machine):
    machine.set("count", "0")
    assert "Modal does not know who asks" in run(node, expect=1)


def test_a_run_that_began_on_modal_is_finished_here_with_the_same_identity(node: Cli, machine: Machine):
    machine.set("count", "0")
    with account_with_vllm(node.folder / "modal") as modal:
        node.env |= modal.variables
        run(node, "--eval.num_examples=4")
        assert deployed(node) is not None
        machine.set("count", "2")
        (node.run_dir / "prepared.json").unlink()  # as on a machine that sees the run for the first time
        run(node, "--eval.num_examples=10")
    assert len(node.rows()) == 10
    assert deployed(node) is None
