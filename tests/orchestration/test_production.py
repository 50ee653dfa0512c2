"""The production server of `deployments/compose.yaml`: its commands and variables, on a real PostgreSQL and a real Redis."""

import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import httpx
import pytest

from tests.support.cli import finished
from tests.support.compose import GIVEN, ROOT, postgres_program, production, services
from tests.support.processes import until

RUNS = "/flow_runs/filter"


@pytest.fixture
def server(mark):
    with (
        tempfile.TemporaryDirectory(prefix="modal-eval-production-") as name,  # PostgreSQL's user has to get in
        production(Path(name), mark.env) as made,
    ):
        yield made


def ask(server, replica, path, **body):
    user, password = GIVEN["PREFECT_AUTH"].split(":")
    found = httpx.post(server.api_url(replica) + path, json=body, auth=(user, password), timeout=30)
    return found.raise_for_status().json()


def names_and_states(server, replica):
    return {(one["name"], one["state_type"]) for one in ask(server, replica, RUNS)}


def test_a_run_goes_on_while_postgresql_and_an_api_server_die_and_its_history_comes_back_from_the_backup(
    server, cli, upstream
):
    upstream.script(default={"latency": 0.2})
    cli.env |= {"PREFECT_API_URL": server.api_url("proxy"), "PREFECT_API_AUTH_STRING": GIVEN["PREFECT_AUTH"]}
    more = ("--eval.rollouts=4", "--eval.max_concurrent=1")
    running = cli.start("run", *cli.arguments(upstream.base_url, *more))
    upstream.wait_for_posts(5, timeout=240)
    server.processes["postgres"].stop()
    os.kill(server.processes["first"].pid, signal.SIGKILL)
    upstream.wait_for_posts(15, timeout=240)
    server.start_postgres()
    finished(running, expect=0, timeout=300)
    assert len(cli.rows()) == 40
    assert upstream.stats()["repeated_after_finish"] == {}
    assert server.processes["first"].poll() is not None, "the second one has taken everything over"
    until(lambda: {state for _, state in names_and_states(server, "second")} == {"COMPLETED"}, within=120)
    before = names_and_states(server, "second")
    assert len(before) == 1

    folder = server.folder / "backups"
    folder.mkdir()
    env = {**server.variables("backup"), "BACKUP_DIR": str(folder)}
    said = subprocess.run(["sh", ROOT / "deployments" / "backup", "once"], env=env, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    (dump,) = folder.iterdir()
    for command in (["createdb", "restored"], ["pg_restore", "--no-owner", "--dbname=restored", str(dump)]):
        subprocess.run([postgres_program(command[0]), *command[1:]], env=env, check=True)
    query = [postgres_program("psql"), "-At", "--dbname=restored", "-c", "select name, state_type from flow_run"]
    rows = subprocess.run(query, env=env, check=True, capture_output=True, text=True).stdout.split("\n")
    assert {tuple(row.split("|")) for row in rows if row} == before
    assert httpx.get(server.api_url("proxy") + "/admin/version", timeout=30).status_code == 401


def test_every_setting_of_the_compose_file_is_one_that_prefect_knows():
    from prefect.settings import get_current_settings

    known = set()

    def collect(settings, prefix):
        for name in type(settings).model_fields:
            value = getattr(settings, name)
            if hasattr(type(value), "model_fields"):
                collect(value, f"{prefix}_{name}")
            else:
                known.add(f"{prefix}_{name}".upper())

    collect(get_current_settings(), "PREFECT")
    asked = {name for one in services().values() for name in one.get("environment", {}) if name.startswith("PREFECT_")}
    of_redis = {name for name in asked if name.startswith("PREFECT_REDIS_MESSAGING_")}
    assert asked - known - of_redis == set()
    assert len(asked) > 15


def test_what_the_compose_file_asks_for_is_in_the_example_of_its_variables():
    wanted = set(re.findall(r"\$\{(\w+)", (ROOT / "deployments" / "compose.yaml").read_text()))
    example = (ROOT / "deployments" / "production.env.example").read_text()
    assert wanted == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_a_backup_that_cannot_be_made_leaves_none(tmp_path):
    env = {
        **os.environ,
        "PGHOST": "127.0.0.1",
        "PGPORT": "1",
        "PGUSER": "x",
        "PGDATABASE": "x",
        "BACKUP_DIR": str(tmp_path),
    }
    postgres_program("pg_dump")
    failed = subprocess.run(["sh", ROOT / "deployments" / "backup", "once"], env=env, capture_output=True)
    assert failed.returncode != 0
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".part")] == []
