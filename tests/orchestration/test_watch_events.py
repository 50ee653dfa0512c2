"""What a real Prefect server hears of new checkpoints, from the command line, the flow's block and the HTTP endpoint."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from modal_eval.checkpoints.s3_objects import Address
from modal_eval.checkpoints.watching import Memory, Watcher
from tasks.events import _client as event_client
from tasks.events import announce_checkpoint
from tests.support.aws import aws_server, random_order, two_shards
from tests.support.checkpoints import checkpoint
from tests.support.cli import Cli, finished, kill
from tests.support.prefect_server import get, post
from tests.support.processes import until

ROOT = Path(__file__).resolve().parents[2]
BURST = 200
SAVE_BLOCK = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    import blocks
    blocks.register_all()
    blocks.CheckpointBucket(
        address=sys.argv[2], queue_url=sys.argv[3], memory=sys.argv[4], endpoint_url=sys.argv[5], region="us-east-1",
        access_key_id="the-teams-key", secret_access_key="the-teams-secret",
    ).save("team", overwrite=True)
"""
TOKEN = "a-token-that-nobody-guesses"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with aws_server(tmp_path_factory.mktemp("aws")) as running:
        yield running


def events(api: str, bucket: str) -> list[dict]:
    """Every `checkpoint.created` event of a bucket that the server has."""
    query = {
        "filter": {"event": {"name": ["checkpoint.created"]}, "any_resource": {"id": [f"s3://{bucket}"]}},
        "limit": 50,
    }
    page = post(f"{api}/events/filter", query)
    found = page["events"]
    while page["next_page"]:
        page = get(page["next_page"])
        found += page["events"]
    return found


def count(api: str, bucket: str) -> int:
    """How many there are, for a fraction of the work; asked a few times a second, so that the server has time for events."""
    time.sleep(0.3)
    query = {
        "filter": {"event": {"name": ["checkpoint.created"]}, "any_resource": {"id": [f"s3://{bucket}"]}},
        "limit": 1,
    }
    return int(post(f"{api}/events/filter", query)["total"])


def test_a_burst_and_a_slow_upload_under_a_watch_that_is_killed_give_one_event_each(
    cli: Cli, prefect_api: str, server, tmp_path
):
    mine, url = server.fresh(queue=True)
    told = [str(ROOT), f"s3://{mine.bucket}/runs", url, str(tmp_path / "memory"), server.url]
    for name in [name for name in cli.env if name.startswith("AWS_")]:
        del cli.env[name]
    subprocess.run([sys.executable, "-c", SAVE_BLOCK, *told], env=cli.env, check=True, timeout=300)
    slow, paused = two_shards(), threading.Event()
    order = random_order(slow, seed=8)

    def upload() -> None:
        mine.put("runs/job/slow_step7", slow, order[:3])
        for number in random.Random(1).sample(range(BURST), BURST):
            files = checkpoint({"model.safetensors": (str(number),)})
            mine.put(f"runs/job/math_step{number}", files, ["model.safetensors", "config.json", "tokenizer.json"])
        paused.wait()
        mine.put("runs/job/slow_step7", slow, order[3:])
        mine.put("runs/job/slow_step7", slow, random_order(slow, seed=9))

    uploader = threading.Thread(target=upload)
    uploader.start()
    try:
        for enough in (20, 90):
            process = cli.start("watch", "loop", "--bucket=team", "--settle=0", "--interval=1")
            cli.wait_for(lambda enough=enough: count(prefect_api, mine.bucket) >= enough, process)
            kill(process)
    finally:
        paused.set()
    uploader.join()
    process = cli.start("watch", "loop", "--bucket=team", "--settle=0", "--interval=1")
    cli.wait_for(lambda: count(prefect_api, mine.bucket) > BURST and mine.is_empty(url), process)
    kill(process)
    again = cli("watch", "once", "--bucket=team", "--settle=0", "--json")
    heard = events(prefect_api, mine.bucket)
    assert Counter(event["payload"]["prefix"] for event in heard) == Counter(
        ["runs/job/slow_step7", *(f"runs/job/math_step{number}" for number in range(BURST))]
    )
    assert "the-teams-secret" not in again.stdout + again.stderr
    slow_one = next(event for event in heard if event["payload"]["run"] == "slow")
    assert slow_one["resource"] == {
        "prefect.resource.id": f"s3://{mine.bucket}/runs/job/slow_step7",
        "prefect.resource.name": "slow_step7",
        "modal-eval.run": "slow",
        "modal-eval.step": "7",
    }
    payload = slow_one["payload"]
    assert (payload["step"], payload["stage"], payload["model"]) == (7, None, f"s3://{mine.bucket}/runs/job/slow_step7")
    assert payload["revision"].startswith("sha256:")


def test_the_endpoint_takes_word_of_a_checkpoint_from_whoever_has_the_token(cli: Cli, prefect_api: str, server):
    mine, _ = server.fresh()
    cli.env |= {**server.env, "MODAL_EVAL_WATCH_TOKEN": TOKEN}
    files = two_shards()
    mine.put("runs/math_final", {"config.json": files["config.json"]})
    process = cli.start("watch", "serve", f"s3://{mine.bucket}/runs", "--port=0", "--interval=1")
    heard = [process.stderr.readline()]
    url = heard[0].rpartition(" ")[2].strip()
    told = {"bucket": mine.bucket, "prefix": "runs/math_final/", "run": "math", "step": None, "stage": "final"}
    key = {"Authorization": f"Bearer {TOKEN}"}
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        assert httpx.post(url, json=told, headers=wrong).status_code == 401
    assert httpx.post(url, json={"bucket": mine.bucket}, headers=key).status_code == 422
    assert httpx.post(url, json=told | {"prefix": "elsewhere/x"}, headers=key).status_code == 422
    assert httpx.post(url, content=b"x" * 20_000, headers=key).status_code == 413
    waiting = httpx.post(url, json=told, headers=key, timeout=60)
    assert (waiting.status_code, waiting.json()["outcome"]) == (202, "waiting")
    assert "it lacks a tokenizer" in waiting.json()["why"]
    mine.put("runs/math_final", files)
    until(lambda: httpx.post(url, json=told, headers=key, timeout=60).json()["outcome"] == "known")
    until(lambda: len(events(prefect_api, mine.bucket)) == 1)
    assert events(prefect_api, mine.bucket)[0]["payload"]["stage"] == "final"
    process.terminate()
    ended = finished(process, expect=None)
    assert process.returncode in (0, -15)
    assert TOKEN not in "".join(heard) + ended.stdout + ended.stderr


def test_what_the_server_has_is_not_sent_again_even_by_a_watch_that_remembers_nothing(
    prefect_api: str, server, tmp_path
):
    mine, _ = server.fresh()
    mine.put("runs/math_step1", two_shards())
    sent = []
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        hooks = event_client(prefect_api)._client.event_hooks
        hooks["request"] = [lambda request: sent.append((request.method, request.url.path))]
        for memory in ("one", "other"):
            client = mine.client()
            where = Address(mine.bucket, "runs")
            made = Watcher(client, where, Memory.at(str(tmp_path / memory), client), announce_checkpoint, settle_s=0)
            assert made.look() == {"announced": 1}
            until(lambda: len(events(prefect_api, mine.bucket)) == 1)
    assert sent.count(("POST", "/api/events")) == 1


def test_a_watch_that_cannot_begin_here_says_what_to_change_in_one_line(cli: Cli, prefect_api: str):
    cli.env |= {"MODAL_EVAL_WATCH_TOKEN": TOKEN, "AWS_REGION": "us-east-1"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, env, arguments in (
            ("check AWS_PROFILE", {"AWS_PROFILE": "nobodys"}, ["--port=0"]),
            ("AWS_ENDPOINT_URL (with its http:// or https://)", {"AWS_ENDPOINT_URL": "localhost:9000"}, ["--port=0"]),
            (f"cannot listen on 127.0.0.1:{port} (Address already in use); give --port", {}, [f"--port={port}"]),
            ("cannot listen on no-such-host.invalid:0 (", {}, ["--host=no-such-host.invalid", "--port=0"]),
            ("cannot listen on 127.0.0.1:70000 (", {}, ["--port=70000"]),
        ):
            before, cli.env = cli.env, {**cli.env, **env}
            ran = cli("watch", "serve", "s3://nobody/x", *arguments, expect=None)
            cli.env = before
            assert ran.returncode in (1, 2)
            assert words in " ".join(ran.stderr.split())
            assert "Traceback" not in ran.stderr


def test_a_watch_that_nobody_would_hear_or_anybody_could_use_is_refused_in_one_line(cli: Cli):
    address = "s3://nobody/x"
    for words, env, arguments in (
        ("PREFECT_API_URL is not set", {"PREFECT_API_URL": ""}, ["once", address]),
        ("neither bucket nor address is set", {}, ["once"]),
        ("address='bucket/x'", {}, ["loop", "bucket/x"]),
        ("MODAL_EVAL_WATCH_TOKEN holds 0 characters", {}, ["serve", address]),
        ("holds 5 characters", {"MODAL_EVAL_WATCH_TOKEN": "short"}, ["serve", address]),
    ):
        cli.env = {**cli.env, **env}
        ran = cli("watch", *arguments, expect=None)
        assert ran.returncode in (1, 2)
        assert words in ran.stderr
        assert "Traceback" not in ran.stderr
        cli.env = {**cli.env, "PREFECT_API_URL": os.environ.get("PREFECT_API_URL", "http://127.0.0.1:9/api")}
