"""Blocks on a real Prefect server: registered, filled in, named by a flow's parameters, and their secrets kept."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

import blocks
from flows.nightly import nightly
from modal_eval.compare.baselines import baseline_path, save_baseline
from modal_eval.compare.gate import Verdict
from modal_eval.config.models import Overrides
from modal_eval.errors import ConfigError
from modal_eval.results.files import write_json
from tasks.accounts import in_the_name_of
from tasks.gate import refuse_unusable, share_baseline, shared_baseline, tell
from tests.support.cli import Cli
from tests.support.hub_server import TOKEN, hub_server
from tests.support.prefect_server import get
from tests.support.upstream import upstream

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {"as-the-teams-secret", "aws-the-teams-secret", TOKEN, "json://127.0.0.1:9/hook-of-the-team"}
EVALUATE = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    from pathlib import Path
    from flows.eval import eval
    from modal_eval.config.models import Overrides
    infra = {"target": "endpoint", "base_url": sys.argv[3]}
    eval("stub", sys.argv[2], run_dir=Path(sys.argv[4]), overrides=Overrides(infra=infra), hub_repository="team")
"""


@pytest.fixture
def here(prefect_api):
    """This process asks the session's server."""
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        yield prefect_api


def example_blocks() -> dict[str, Any]:
    return {
        "checkpoint-bucket": blocks.CheckpointBucket(address="s3://b/p", secret_access_key="aws-the-teams-secret"),
        "node": blocks.Node(host="node-a", home="/srv/modal-eval", python="/srv/modal-eval/.venv/bin/python"),
        "modal-account": blocks.ModalAccount(token_id="ak-1", token_secret="as-the-teams-secret", environment="ci"),
        "hub-repository": blocks.HubRepository(repository="team/evals", token=TOKEN),
        "baseline": blocks.Baseline(
            baseline="b", model="org/m@1", made_at="2026-01-01", benchmarks={"gsm8k": {"scores": {}}}
        ),
        "notification-target": blocks.NotificationTarget(urls={"chat": "json://127.0.0.1:9/hook-of-the-team"}),
    }


@pytest.mark.parametrize("how", [["-f", "blocks/__init__.py"], ["-m", "blocks"]], ids=["file", "module"])
def test_prefects_own_command_registers_every_block(prefect_api, how):
    ran = subprocess.run(
        [sys.executable, "-m", "prefect", "block", "register", *how],
        cwd=ROOT, env={**os.environ, "PREFECT_API_URL": prefect_api}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "registered 6 blocks" in ran.stdout
    for slug in example_blocks():
        assert get(f"{prefect_api}/block_types/slug/{slug}")["slug"] == slug


def test_a_block_comes_back_as_it_was_saved_and_the_api_shows_none_of_its_secrets(here):
    assert blocks.register_all() == blocks.register_all() == list(example_blocks())
    for slug, block in example_blocks().items():
        block.save("example", overwrite=True)
        assert type(block).load("example").model_dump() == block.model_dump()
        stored = json.dumps(get(f"{here}/block_types/slug/{slug}/block_documents/name/example"))
        assert not any(secret in stored for secret in SECRETS), stored
        assert not any(secret in repr(block) for secret in SECRETS)
    assert "aws-the-teams-secret" not in repr(example_blocks()["checkpoint-bucket"].access())


def test_an_evaluation_pushes_in_the_name_of_the_block_that_its_parameter_names(cli: Cli, here):
    blocks.register_all()
    example_blocks()["hub-repository"].save("team", overwrite=True)
    with upstream() as server, hub_server() as hub:
        cli.env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cli.folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
        cli.env.pop("HF_TOKEN", None)
        told = [str(ROOT), cli.benchmark(), server.base_url, str(cli.run_dir)]
        subprocess.run([sys.executable, "-c", EVALUATE, *told], env=cli.env, cwd=cli.folder, check=True, timeout=480)
    assert json.loads((cli.run_dir / "published.json").read_text())["repo"] == "team/evals"
    for path in cli.run_dir.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_modals_client_finds_the_named_account_for_as_long_as_it_is_named(here, monkeypatch):
    from modal.config import config

    monkeypatch.setenv("MODAL_TOKEN_ID", "ak-of-this-machine")
    monkeypatch.delenv("MODAL_ENVIRONMENT", raising=False)
    blocks.register_all()
    example_blocks()["modal-account"].save("prod", overwrite=True)
    with in_the_name_of("prod", None) as repository:
        assert repository is None
        assert (config["token_id"], config["token_secret"], config["environment"]) == (
            "ak-1",
            "as-the-teams-secret",
            "ci",
        )
    assert config["token_id"] == "ak-of-this-machine"
    assert "MODAL_ENVIRONMENT" not in os.environ
    with (
        pytest.raises(ConfigError, match="there is no Modal Account block called 'nobodys'"),
        in_the_name_of("nobodys", None),
    ):
        pass


def test_a_baseline_made_on_one_node_is_known_on_every_other(here, tmp_path, monkeypatch):
    blocks.register_all()
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path / "one"))
    path = save_baseline("Main.v1", "org/m", {})
    share_baseline("Main.v1")
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path / "other"))
    assert shared_baseline("Main.v1") == json.loads(path.read_text())
    with pytest.raises(ConfigError, match="there is no baseline 'nobodys'"):
        shared_baseline("nobodys")


def test_the_newer_of_a_shared_baseline_and_this_machines_counts(here, tmp_path, monkeypatch):
    blocks.register_all()
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path))
    save_baseline("newer", "org/first", {})
    share_baseline("newer")
    save_baseline("newer", "org/second", {})
    assert shared_baseline("newer")["model"] == "org/second"
    share_baseline("newer")
    before = json.loads(baseline_path("newer").read_text())
    write_json(baseline_path("newer"), {**before, "model": "org/old", "made_at": "2026-01-01T00:00:00+00:00"})
    assert shared_baseline("newer")["model"] == "org/second"


def test_two_baselines_whose_names_make_one_block_are_never_taken_for_each_other(here, tmp_path, monkeypatch):
    blocks.register_all()
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path))
    for name in ("rc_1", "RC.1"):
        save_baseline(name, f"org/{name}", {})
    share_baseline("rc_1")
    assert shared_baseline("RC.1")["model"] == "org/RC.1"
    with pytest.raises(ConfigError, match="no baseline 'rc-1'"):
        shared_baseline("rc-1")
    with pytest.raises(ConfigError, match="'RC.1' cannot be shared: its block rc-1 holds the baseline 'rc_1'"):
        share_baseline("RC.1")
    with pytest.raises(ConfigError, match="'RC.1' cannot be shared"):
        refuse_unusable("RC.1", None, save_baseline=True)
    assert shared_baseline("rc_1")["model"] == "org/rc_1"


@contextlib.contextmanager
def hook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An Apprise URL, and what was told to it."""
    heard = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"json://127.0.0.1:{server.server_port}/hook", heard
        finally:
            server.shutdown()
            thread.join()


def test_a_night_whose_suite_cannot_be_opened_fails_with_the_reason_and_people_are_told(here, tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path))
    wrong = Overrides.model_validate({"infra": {"target": "endpoint"}})
    blocks.register_all()
    with hook() as (url, heard):
        blocks.NotificationTarget(urls={"chat": url}).save("watchers", overwrite=True)
        for save in (True, False):
            with pytest.raises(ConfigError, match="infra.base_url"):
                nightly("stub", "code", "main", save_baseline=save, where="here", notify="watchers", overrides=wrong)
            save_baseline("main", "org/m", {})
    assert len(heard) == 2
    for told in heard:
        assert told["title"] == "the suite for the gate of main could not be started"
        assert "infra.base_url" in told["message"]


def test_who_can_be_told_of_a_regression_is_told_and_who_cannot_is_named(here, caplog):
    blocks.register_all()
    with hook() as (url, heard):
        blocks.NotificationTarget(urls={"chat": url, "gone": "json://127.0.0.1:9/", "typo": "x"}).save(
            "people", overwrite=True
        )
        tell("people", [Verdict("ifeval", "equal")], "main")
        tell(None, [Verdict("gsm8k", "worse")], "main")
        with caplog.at_level(logging.WARNING, "modal_eval"):
            tell(
                "people",
                [Verdict("gsm8k", "worse"), Verdict("ifeval", "equal"), Verdict("aime", "missing", why="lost")],
                "main",
            )
    assert [one.args for one in caplog.records if one.name == "modal_eval.gate"] == [
        ("gone", "people"),
        ("typo", "people"),
    ]
    assert "127.0.0.1" not in caplog.text, "an Apprise URL is a secret"
    (told,) = heard
    assert told["title"] == "2 of 3 benchmarks do not pass the gate of main"
    assert told["message"] == "gsm8k is worse\naime is missing: lost"
