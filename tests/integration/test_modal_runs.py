"""`modal-eval run` on Modal, whole: the real client and the real flow against a stand-in for Modal on loopback.

In front of a deployed function the stand-in does what Modal's web layer is documented to do, on a shorter clock; a
container is a real process that has what was uploaded, the secrets, and nothing else of ours.
"""

from __future__ import annotations

import hashlib
import json
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli, finished
from tests.support.hub import Hub, serve_hub
from tests.support.modal_account import COMMIT, FILES, HIDDEN, MODEL, account_with_vllm
from tests.support.processes import Mark

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--infra.gpu=H100:2", "--vllm.data_parallel_size=2", "--infra.timeout=5000", "--infra.scaledown_window=300",
    "--infra.max_concurrent_inputs=77", "--infra.startup_timeout=600", "--vllm.max_model_len=8192",
)  # fmt: skip


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve_hub(COMMIT, {MODEL: FILES}) as served:
        yield served


def customer(cli: Cli, hub: Hub, variables: dict[str, str]) -> Cli:
    """`cli` with a Hub and an account on Modal."""
    cli.env = {name: value for name, value in cli.env.items() if name not in HIDDEN}
    cli.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cli.folder / "hf"), "HF_HUB_DISABLE_XET": "1", **variables}
    return cli


def arguments(cli: Cli, *more: str) -> list[str]:
    return ["run", "-m", MODEL, "-b", cli.benchmark(), "--infra.target=modal", "--run-dir", str(cli.run_dir), *more]


class Told:
    """One finished run, and what was seen of it."""

    cli: Cli
    events: dict[str, list[dict[str, Any]]]
    said: str
    key: str
    key_mode: int
    exposed: list[str]
    """Command lines and harnesses that had the key."""
    command: list[str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, prefect_api: str, hub: Hub) -> Told:
    """One run of ten examples, watched while it generates."""
    told, mark, folder = Told(), Mark(), tmp_path_factory.mktemp("modal-run")
    with account_with_vllm(folder / "modal", latency=0.3) as modal:
        told.cli = cli = customer(Cli(folder, mark, prefect_api), hub, modal.variables)
        process = cli.start(*arguments(cli, "--eval.max_concurrent=2", *SETTINGS))
        journal = cli.run_dir / "checkpoint.jsonl"
        cli.wait_for(lambda: journal.is_file() and b"\n" in journal.read_bytes(), process)
        (key_file,) = (folder / "state" / "modal").glob("*.key")
        told.key, told.key_mode = key_file.read_text(), stat.S_IMODE(key_file.stat().st_mode)
        told.exposed = [line for line in mark.processes().values() if told.key in line]
        told.exposed += [
            line
            for pid, line in mark.processes().items()
            if "adapters" in line and told.key.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        ]
        ended = finished(process, 0)
        told.said = ended.stdout + ended.stderr + modal.log.read_text()
        told.events = {kind: modal.events(kind) for kind in ("deploy", "stop", "image", "container")}
        (command,) = (modal.home).glob("modal-container-*/command")
        told.command = command.read_text().splitlines()
    assert mark.wait_until_gone() == {}
    return told


def test_a_run_deploys_asks_scores_and_stops(told: Told) -> None:
    (deployed,), (stopped,) = told.events["deploy"], told.events["stop"]
    assert stopped["name"] == deployed["name"]
    assert len(told.events["container"]) == 1
    assert len(told.cli.rows()) == 10
    assert all(row["reward"] is not None for row in told.cli.rows())
    config = json.loads((told.cli.run_dir / "run_config.json").read_text())
    assert config["app_name"] == deployed["name"]
    assert config["modal_url"] == f"{deployed['url']}/v1"
    assert config["server"]["engine"] == "vllm"


def test_a_run_leaves_no_lease_and_no_key_and_the_servers_log(told: Told) -> None:
    state = told.cli.folder / "state"
    assert list((state / "leases").glob("*.json")) == []
    assert list((state / "modal").glob("*.key")) == []
    assert "vLLM has the secret: yes" in (told.cli.run_dir / "logs" / "modal_vllm.log").read_text()


def test_the_app_has_the_benchmarks_settings_and_no_gpu_while_nobody_asks(told: Told) -> None:
    (made,) = told.events["deploy"]
    wanted = {
        "module": "modal_vllm", "function": "serve", "gpu": "H100:2", "timeout": 5000, "startup_timeout": 600,
        "scaledown_window": 300, "min_containers": 0, "max_containers": 1, "max_inputs": 77, "web_port": 8000,
        "volumes": ["/modal-eval/checkpoints", "/modal-eval/huggingface", "/modal-eval/vllm"], "secrets": ["st-huggingface"],
        "variables": ["MODAL_EVAL_COMMAND", "MODAL_EVAL_LIFETIME_S", "VLLM_API_KEY"],
    }  # fmt: skip
    assert {**{name: made[name] for name in wanted}, "volumes": sorted(made["volumes"])} == wanted
    assert any(name.endswith("/modal_vllm.py") for name in made["files"])
    assert not any("modal_eval" in name for name in made["files"]), "the container needs nothing of the library"


def test_the_app_says_on_modal_who_holds_it_and_until_when(told: Told) -> None:
    (made,) = told.events["deploy"]
    assert made["tags"]["tool"] == "modal-eval"
    assert made["tags"]["model"] == "org-tiny-step40"
    assert made["tags"]["holder"].startswith(socket.gethostname()[:20])
    assert time.time() + 80_000 < float(made["tags"]["deadline"]) < time.time() + 86_400


def test_the_container_runs_vllm_with_the_pinned_revision_and_the_local_servers_flags(told: Told) -> None:
    words = " ".join(told.command)
    assert words.startswith(f"serve {MODEL} --host 0.0.0.0 --port 8000 --revision {COMMIT}")
    assert f"--served-model-name {MODEL} --dtype auto --max-model-len 8192" in words
    assert "--data-parallel-size 2" in words


def test_the_image_has_the_locked_packages_of_the_local_servers(told: Told) -> None:
    lock = (ROOT / "requirements" / "vllm.txt").read_bytes()
    installing = [image for image in told.events["image"] if hashlib.sha256(lock).hexdigest() in image["files"]]
    (image,) = installing
    assert any("uv pip install" in line and "--requirement" in line for line in image["commands"])


def test_the_key_is_in_a_private_file_and_in_no_command_line_harness_log_or_result(told: Told) -> None:
    assert told.key_mode == 0o600
    assert len(told.key) >= 40
    assert told.exposed == []
    assert told.key not in told.said
    left = [path for path in told.cli.run_dir.rglob("*") if path.is_file() and told.key.encode() in path.read_bytes()]
    assert left == []


def test_a_generation_of_ten_minutes_survives_redirects_lost_connections_and_an_expired_result(
    cli: Cli, hub: Hub
) -> None:
    """Modal's clock runs a thousand times faster: 150 s are 0.15 s, and each answer takes ten minutes of it."""
    options = ("--cut", "0.15", "--drop", "5", "--expire", "1")
    with account_with_vllm(cli.folder / "modal", *options, latency=0.6) as modal:
        customer(cli, hub, modal.variables)
        cli(*arguments(cli))
        assert len(cli.rows()) == 10
        assert all(row["reward"] is not None for row in cli.rows())
        asked = [event for event in modal.events("request") if event["path"].endswith("/chat/completions")]
        posts = [event for event in asked if event["method"] == "POST"]
        assert len(posts) == 11, "the one result that has expired is generated again, and nothing else"
        assert not any(event["reload"] for event in posts)
        assert len(asked) - len(posts) >= 3 * 10
        assert cli.metadata()["calls"]["redirects"] > 0
