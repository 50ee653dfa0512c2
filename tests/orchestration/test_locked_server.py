"""A Prefect server that asks for a password: who has none, or another one, is told so before anything is made."""

import json
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings

from modal_eval.cli.node import secrets_of_prefect
from tests.support.cli import Cli
from tests.support.prefect_server import prefect_server
from tests.support.processes import Mark

MEND = "set PREFECT_API_AUTH_STRING=USER:PASSWORD as the server has it"


def test_who_does_not_have_the_servers_password_is_told_which_variable_to_set(
    tmp_path: Path, mark: Mark, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "team:sesame")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING", raising=False)
    run = ["run", "-m", "x", "-b", "demo", "--infra.base_url=http://127.0.0.1:9/v1"]
    with prefect_server(tmp_path / "server") as server:
        cli = Cli(tmp_path, mark, server.api_url)
        for command in (run, ["worker", "--pool=a100"]):
            (line,) = cli(*command, expect=1).stderr.splitlines()
            assert (
                "(HTTP 401), and PREFECT_API_AUTH_STRING is not set; set PREFECT_API_AUTH_STRING=USER:PASSWORD" in line
            )
        assert seen_by_doctor(cli, expect=1) == ("missing", MEND)
        cli.env["PREFECT_API_AUTH_STRING"] = "team:wrong"
        (line,) = cli("node", "list", expect=1).stderr.splitlines()
        assert "PREFECT_API_AUTH_STRING is another than its own; set" in line
        assert "wrong" not in line
        assert seen_by_doctor(cli, expect=1) == ("missing", MEND)
        assert not (tmp_path / "outputs").exists()
        cli.env["PREFECT_API_AUTH_STRING"] = "team:sesame"
        assert seen_by_doctor(cli, expect=None) == ("ok", "")
        assert cli("node", "list", "--json").stdout.strip() == "[]"


def test_a_node_is_given_the_servers_password():
    with temporary_settings({PREFECT_API_AUTH_STRING: "team:sesame"}):
        assert secrets_of_prefect() == {"PREFECT_API_AUTH_STRING": "team:sesame"}
    with temporary_settings(restore_defaults={PREFECT_API_AUTH_STRING}):
        assert secrets_of_prefect() == {}


def seen_by_doctor(cli: Cli, expect: int | None) -> tuple[str, str]:
    found = {one["what"]: one for one in json.loads(cli("doctor", "--json", expect=expect).stdout)}["Prefect server"]
    return found["state"], found["mend"]
