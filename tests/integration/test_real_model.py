"""A real model behind a real server, through the whole of the command line: SmolLM2-135M-Instruct on llama.cpp."""

import json
import os
import random
import signal

import pytest

from modal_eval.proxy import answered_rollouts
from tests.support.cli import finished, kill
from tests.support.data import data_file
from tests.support.llamacpp import MODEL, serving_llamacpp
from tests.support.relay import relay

IN_FLIGHT = 8
KILLS = 10
KEYS = [(example, rollout) for example in range(20) for rollout in range(4)]


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory):
    """Root URL of a real server that this module shares.

    It has one slot and no prefix cache, so an answer depends on its call alone: neighbours in a batch, and what of a
    prompt is cached, move the last bits of a logit, and with them a seeded answer.
    """
    with serving_llamacpp(tmp_path_factory.mktemp("llamacpp"), at_once=1, threads=1, prefix_caching=False) as url:
        yield url.removesuffix("/v1")


def gsm8k(cli, url):
    return [
        "-m", MODEL, "-b", "gsm8k", "--run-dir", str(cli.run_dir), f"--infra.base_url={url}/v1",
        f"--env.data_files={data_file('gsm8k/test.jsonl')}", "--eval.num_examples=20", "--eval.rollouts=4",
        f"--eval.max_concurrent={IN_FLIGHT}", "--sampling.seed=7", "--sampling.max_tokens=16",
    ]  # fmt: skip


def demo(cli, examples=12):
    return [
        "-m", MODEL, "-b", "demo", "--run-dir", str(cli.run_dir), f"--eval.num_examples={examples}",
        "--eval.max_concurrent=2", "--sampling.max_tokens=40",
    ]  # fmt: skip


def keys_of(rows):
    return [(row["example_id"], row["rollout"]) for row in rows]


def journal_lines(cli):
    journal = cli.run_dir / "checkpoint.jsonl"
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


@pytest.mark.timeout(1800)
def test_gsm8k_killed_ten_times_ends_with_the_rows_of_an_undisturbed_run_and_pays_for_nothing_twice(
    cli, mark, llamacpp
):
    with relay(llamacpp) as server:
        cli("run", *gsm8k(cli, server.url))
        assert server.posts() == len(KEYS)
    undisturbed = cli.rows()
    assert keys_of(undisturbed) == KEYS
    assert all(row["completion"][0]["content"] for row in undisturbed)
    cli.run_dir = cli.folder / "killed"
    chance = random.Random(7)
    finished_at_kills = []
    with relay(llamacpp) as server:
        for kills in range(KILLS + 1):
            resumed = ["resume", str(cli.run_dir)] if kills else ["run", *gsm8k(cli, server.url)]
            process = cli.start(*resumed)
            if kills == KILLS:
                finished(process, 0)
                break
            wanted = server.posts() + IN_FLIGHT + chance.randint(0, 6)
            cli.wait_for(lambda wanted=wanted: server.posts() >= wanted, process)
            assert process.poll() is None, process.communicate()
            kill(process)
            assert mark.wait_until_gone() == {}
            kept = answered_rollouts(cli.run_dir / "checkpoint.jsonl")
            finished_at_kills.append({rollout: count for rollout, count in server.calls().items() if rollout in kept})
        paid = server.calls()
    assert set(paid) == {f"{example}/{rollout}" for example, rollout in KEYS}
    for finished_then in finished_at_kills:
        assert {rollout: paid[rollout] for rollout in finished_then} == finished_then
    assert sum(paid.values()) <= len(KEYS) + KILLS * IN_FLIGHT
    assert cli.rows() == undisturbed


def test_a_model_server_killed_in_the_middle_is_told_with_its_last_words_and_resume_finishes(cli, mark):
    process = cli.start("run", *demo(cli))
    cli.wait_for(lambda: journal_lines(cli) >= 4, process)
    os.kill(cli.process_of("llamacpp_server.py"), signal.SIGKILL)
    ended = finished(process, 1)
    assert "was killed by signal 9; the end of" in ended.stderr
    last_word = (cli.run_dir / "logs" / "llamacpp.log").read_text().splitlines()[-1].strip()
    assert last_word
    assert last_word in ended.stderr
    assert "modal-eval resume" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert mark.wait_until_gone() == {}
    assert json.loads(cli("status", "--json").stdout) == []
    cli("resume", str(cli.run_dir))
    assert keys_of(cli.rows()) == [(example, 0) for example in range(12)]
    assert cli.metadata()["num_unscored"] == 0


def test_a_killed_command_takes_its_model_server_along_and_stop_clears_the_lease(cli, mark):
    process = cli.start("run", *demo(cli))
    cli.wait_for(lambda: journal_lines(cli) >= 2, process)
    (lease,) = json.loads(cli("status", "--json").stdout)
    assert (lease["model"], lease["benchmark"], lease["holder_alive"]) == (MODEL, "demo", True)
    kill(process)
    assert mark.wait_until_gone() == {}
    (left,) = json.loads(cli("status", "--json").stdout)
    assert lasting(left) == lasting(lease)
    assert (left["holder"], left["holder_alive"]) == ("nobody: its holder is dead", False)
    assert json.loads(cli("stop", "-m", MODEL, "-b", "gsm8k", "--json").stdout) == []
    (stopped,) = json.loads(cli("stop", "-m", MODEL, "-b", "demo", "--json").stdout)
    assert (stopped["server"], stopped["model"], stopped["outcome"]) == (left["server"], MODEL, "stopped")
    assert json.loads(cli("status", "--json").stdout) == []


def lasting(row):
    """What of a server's row does not move with the clock or with its holder."""
    return {name: value for name, value in row.items() if name not in ("age", "age_s", "holder", "holder_alive")}


def test_without_a_prefect_server_the_embedded_one_is_used_and_gone_afterwards(cli, mark):
    del cli.env["PREFECT_API_URL"]
    ended = cli("run", *demo(cli, examples=6))
    assert "starting Prefect on its embedded database" in ended.stderr
    assert len(cli.rows()) == 6
    assert mark.wait_until_gone() == {}
