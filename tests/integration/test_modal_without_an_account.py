"""Who has no account, no token or no way to Modal is told so in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_modal_serving import command
from tests.support.modal_account import HIDDEN, MODEL, ROOT


@pytest.mark.parametrize("asked", ["run", "deploy"])
def test_without_an_account_a_command_says_so_in_one_line_and_makes_nothing(tmp_path: Path, asked: str) -> None:
    options = ["-m", MODEL, "-b", "gsm8k", "--infra.target=modal"]
    given = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    given |= {"MODAL_CONFIG_PATH": str(tmp_path / "no.toml"), "MODAL_EVAL_OUTPUT_DIR": str(tmp_path / "outputs")}
    ran = subprocess.run(
        [sys.executable, "-m", "modal_eval.cli", asked, *options], env=given, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    assert line.startswith("modal-eval: Modal does not know who asks: run `modal token new`")
    assert ran.stdout == ""
    assert list(tmp_path.iterdir()) == []


def offline(tmp_path: Path, **variables: str) -> dict[str, str]:
    return {
        "MODAL_CONFIG_PATH": str(tmp_path / "no.toml"), "MODAL_EVAL_STATE_DIR": str(tmp_path / "state"),
        "MODAL_TOKEN_ID": "", "MODAL_TOKEN_SECRET": "", **variables,
    }  # fmt: skip


DEPLOY = """if True:
    import sys
    from modal_eval.errors import ServerError
    from modal_eval.serving import modal_calls
    from tests.integration.test_modal_serving import start
    modal_calls.ASK_S = 2.0
    try:
        start(sys.argv[1])
    except ServerError as error:
        print(error)
    """


def refusal(tmp_path: Path, **variables: str) -> str:
    """What somebody is told whose Modal cannot be used."""
    ran = subprocess.run(
        [sys.executable, "-c", DEPLOY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
        env={name: value for name, value in {**os.environ, **offline(tmp_path, **variables)}.items() if value},
    )  # fmt: skip
    assert list((tmp_path / "state" / "leases").glob("*")) == []
    (line,) = ran.stdout.splitlines()
    return line


def test_without_a_token_the_way_to_get_one_is_said_in_one_line(tmp_path: Path) -> None:
    said = refusal(tmp_path)
    assert "it does not know who asks" in said
    assert "modal token new" in said


def test_a_modal_that_does_not_answer_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        said = refusal(tmp_path, MODAL_SERVER_URL=url, MODAL_TOKEN_ID="ak-x", MODAL_TOKEN_SECRET="as-x")
    assert "no answer within 2 s; check the network" in said


def test_status_without_a_network_shows_what_this_machine_knows(tmp_path: Path) -> None:
    ran = command("status", **offline(tmp_path, MODAL_TOKEN_ID="ak-x", MODAL_SERVER_URL="http://127.0.0.1:9"))
    (line, last) = ran.stderr.splitlines()
    assert line.startswith("modal-eval: Modal does not list its apps: ")
    assert last == "No server of ours is running."


def test_an_empty_token_is_no_account_and_nobody_asks_modal(tmp_path: Path) -> None:
    ran = command("status", **offline(tmp_path, MODAL_SERVER_URL="http://127.0.0.1:9"))
    assert ran.stderr.splitlines() == ["No server of ours is running."]
