"""`--push-to-hub`, as a user types it: the evaluation stands whatever the Hub says, and the token stays where it was."""

import json
import re

import pytest

from tests.support.hub_server import TOKEN, hub_server
from tests.support.upstream import upstream

REPO = "team/evals"


@pytest.fixture
def hub(cli):
    with hub_server() as server:
        cli.env |= {
            "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HOME": str(cli.folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        yield server


def run_and_push(cli):
    with upstream() as server:
        return cli("run", *cli.arguments(server.base_url, f"--push-to-hub={REPO}"))


def results_on(hub):
    (found,) = [content for path, content in hub.repo(REPO).files.items() if path.endswith("results.jsonl")]
    return found


def token_traces(cli):
    files = [path for path in cli.folder.rglob("*") if path.is_file()]
    return [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_finished_run_is_pushed_and_the_token_stands_nowhere(cli, hub):
    ended = run_and_push(cli)
    assert f"Pushed to {REPO}" in ended.stderr
    assert hub.repo(REPO).private
    assert results_on(hub) == (cli.run_dir / "results.jsonl").read_bytes()
    assert json.loads((cli.run_dir / "published.json").read_text())["repo"] == REPO
    assert TOKEN not in ended.stdout + ended.stderr
    assert token_traces(cli) == []
    assert not [body for body in hub.received if TOKEN.encode() in body]


def test_a_hub_that_refuses_the_token_spoils_nothing_and_the_push_can_be_repeated(cli, hub):
    cli.env["HF_TOKEN"] = "hf_" + "stale" * 8
    ended = run_and_push(cli)
    assert re.search(rf"not pushed to {REPO}: .*(401|token)", ended.stderr, re.IGNORECASE)
    again = f"modal-eval resume {cli.run_dir} --push-to-hub={REPO}"
    assert again in ended.stderr
    assert cli.metadata()["status"] == "complete"
    assert not (cli.run_dir / "published.json").exists()
    cli.env["HF_TOKEN"] = TOKEN
    assert f"Pushed to {REPO}" in cli(*again.split()[1:]).stderr
    assert results_on(hub) == (cli.run_dir / "results.jsonl").read_bytes()
    hub.faults.append({"path": "", "status": 403, "times": 1000})
    assert f"not pushed to {REPO}" in cli(*again.split()[1:]).stderr


def test_a_hub_that_stays_busy_spoils_nothing(cli, hub):
    hub.faults.append({"path": "", "status": 503, "times": 1000, "headers": {"Retry-After": "0"}})
    ended = run_and_push(cli)
    assert f"not pushed to {REPO}" in ended.stderr
    assert f"modal-eval resume {cli.run_dir} --push-to-hub={REPO}" in ended.stderr
    assert cli.metadata()["status"] == "complete"
    assert token_traces(cli) == []
