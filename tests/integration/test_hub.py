"""The push, against a Hub on loopback, from a process of its own: huggingface_hub reads `HF_ENDPOINT` at import."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.reports.summary import summarize
from modal_eval.results.files import json_line, write_json
from modal_eval.results.run_folder import Run
from tests.support.hub_server import TOKEN, hub_server

REPO = "team/evals"
SECRET = "sesame-open-yourself-12345"
PUSH = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from modal_eval.errors import ModalEvalError
from modal_eval.hub import push_run
try:
    print(json.dumps(asdict(push_run(Path(sys.argv[1]), sys.argv[2], first_delay_s=0.01))))
except ModalEvalError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def run_dir(tmp_path):
    return finished_run(tmp_path / "outputs" / "r1")


def finished_run(folder, answer="The sum is 4.", model="org/model", host="gpu-node-17.internal", **env):
    """A run folder as the stages leave it, with all that must not be uploaded in the places where it turns up."""
    data = folder.parent / "data" / "test.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text("{}\n")
    overrides = Overrides(
        infra={"target": "endpoint", "base_url": f"http://{host}:8123/v1", "api_key_env": "UPSTREAM_KEY"},
        env={"data_files": str(data), **env},
    )
    run = Run.create(resolve(model, BenchmarkConfig(name="toy", env_id="toy-env"), overrides), folder)
    rows = [row(0, 1.0, answer), row(1, 0.0, f"Error\n{folder}/logs\n{socket.gethostname()} said {SECRET}")]
    (folder / "results.jsonl").write_bytes(b"".join(map(json_line, rows)))
    (folder / "checkpoint.jsonl").write_bytes(json_line({"kind": "call", "url": f"http://{host}:8123/v1"}))
    write_json(folder / "checkpoint_meta.json", {"run_id": run.run_id, "completed_rollouts": 2})
    (folder / "logs" / "proxy.log").write_text(f"forwarding for {TOKEN}\n")
    facts = {
        "benchmark": "toy", "run_id": run.run_id, "harness": {"name": "verifiers"}, "model_revision": None,
        "data": {"path": str(data)},
        "server": {"base_urls": [f"http://{host}:8123/v1"]},
    }  # fmt: skip
    write_json(folder / "metadata.json", summarize(run.config, rows, total_rollouts=2, facts=facts))
    return folder


def row(example_id, reward, answer):
    completion = [{"role": "assistant", "content": answer}]
    return {"example_id": example_id, "rollout": 0, "task": "default", "reward": reward, "completion": completion}


def environment(hub, tmp_path, **changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    set_here = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        "UPSTREAM_KEY": SECRET,
    }  # fmt: skip
    return {name: value for name, value in {**kept, **set_here, **changes}.items() if value is not None}


def push(hub, tmp_path, run_dir, **changes):
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(run_dir), REPO],
        env=environment(hub, tmp_path, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )


def pushed(hub, tmp_path, run_dir, **changes):
    ran = push(hub, tmp_path, run_dir, **changes)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def read_back(hub, path):
    answer = httpx.get(f"{hub.url}/datasets/{REPO}/resolve/main/{path}", headers={"Authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 200
    return answer.content


def test_a_run_is_pushed_to_a_private_repository_and_read_back_equal(hub, tmp_path, run_dir):
    published = pushed(hub, tmp_path, run_dir)
    folder = "toy-env--org--model/r1"
    assert hub.repo(REPO).private
    assert published["files"] == ["README.md", *(f"{folder}/{name}" for name in (
        "checkpoint.jsonl", "checkpoint_meta.json", "metadata.json", "results.jsonl", "run_config.json"
    ))]  # fmt: skip
    here = (run_dir / "results.jsonl").read_bytes().splitlines()
    there = read_back(hub, f"{folder}/results.jsonl").splitlines()
    assert there[0] == here[0]
    assert len(there) == len(here)
    assert json.loads(read_back(hub, f"{folder}/metadata.json"))["avg_reward"] == 0.5
    assert json.loads((run_dir / "published.json").read_text()) == published
    assert published["revision"] == hub.repo(REPO).sha


def test_the_card_names_the_score_and_how_to_load_the_rows(hub, tmp_path, run_dir):
    pushed(hub, tmp_path, run_dir)
    card = read_back(hub, "README.md").decode()
    front = yaml.safe_load(card.split("---\n")[1])
    path = front["configs"][0]["data_files"][0]["path"]
    assert path in hub.repo(REPO).files
    assert "0.500" in card
    assert "org/model on toy" in card


def test_no_token_no_path_and_no_host_name_is_in_any_byte_that_was_sent(hub, tmp_path, run_dir):
    pushed(hub, tmp_path, run_dir)
    sent = b"\n".join([*hub.received, *hub.lfs.values(), *hub.repo(REPO).files.values()])
    private = (TOKEN, SECRET, str(tmp_path), str(run_dir), f"{Path.home()}/", "gpu-node-17", ":8123")
    for value in private:
        assert value.encode() not in sent, value
    uploaded = b"\n".join(hub.repo(REPO).files.values())
    assert socket.gethostname().encode() not in uploaded
    assert b"forwarding for" not in uploaded, "a log was uploaded"


def test_an_answer_keeps_the_paths_and_addresses_that_the_model_made_up(hub, tmp_path):
    answer = "Use #!/usr/bin/env python and http://example.com/a; open('/etc/hosts')"
    pushed(hub, tmp_path, finished_run(tmp_path / "outputs" / "r1", answer))
    first = json.loads(read_back(hub, "toy-env--org--model/r1/results.jsonl").splitlines()[0])
    assert first["completion"][0]["content"] == answer


def test_a_host_named_like_a_word_is_taken_out_of_addresses_and_the_word_stays(hub, tmp_path):
    answer = "The model asks the server."
    pushed(hub, tmp_path, finished_run(tmp_path / "outputs" / "r1", answer, host="model"))
    first = json.loads(read_back(hub, "toy-env--org--model/r1/results.jsonl").splitlines()[0])
    assert first["completion"][0]["content"] == answer
    assert "model" in json.loads(read_back(hub, "toy-env--org--model/r1/metadata.json"))
    assert b"model:8123" not in b"\n".join(hub.repo(REPO).files.values())


def test_a_key_given_to_the_environment_is_in_no_byte_that_was_sent_and_a_models_own_token_stays(hub, tmp_path):
    key, token = "AIzaNobodyKnowsThisOne", "<|im_end|>"
    run = finished_run(
        tmp_path / "outputs" / "r1", f"Done.{token}", judge_api_key=key, judge={"token": key}, eos_token=token
    )
    assert key in (run / "run_config.json").read_text()
    pushed(hub, tmp_path, run)
    assert key.encode() not in b"\n".join([*hub.received, *hub.lfs.values(), *hub.repo(REPO).files.values()])
    assert token in read_back(hub, "toy-env--org--model/r1/results.jsonl").decode()


def test_a_503_and_a_412_on_the_way_change_nothing_in_the_end(hub, tmp_path, run_dir):
    with hub_server() as calm:
        pushed(calm, tmp_path, run_dir)
        hub.faults = [{"path": "/commit/", "status": 503, "times": 1}, {"path": "/repos/", "status": 503, "times": 2}]
        hub.before_commit = [lambda hub: hub.repo(REPO).commit("somebody else's", {"theirs.txt": b"theirs"})]
        pushed(hub, tmp_path, run_dir)
        assert hub.repo(REPO).files == {**calm.repo(REPO).files, "theirs.txt": b"theirs"}
        assert len(hub.repo(REPO).commits) == 2


def test_the_same_content_makes_no_second_commit(hub, tmp_path, run_dir):
    first = pushed(hub, tmp_path, run_dir)
    assert pushed(hub, tmp_path, run_dir) == first
    assert len(hub.repo(REPO).commits) == 1


def test_a_second_run_joins_the_first_in_the_card(hub, tmp_path, run_dir):
    pushed(hub, tmp_path, run_dir)
    pushed(hub, tmp_path, finished_run(tmp_path / "outputs" / "r2", model="org/other"))
    card = read_back(hub, "README.md").decode()
    names = [config["config_name"] for config in yaml.safe_load(card.split("---\n")[1])["configs"]]
    assert names == ["toy-env--org--model--r1", "toy-env--org--other--r2"]
    assert card.count("## org/") == 2


def test_what_a_person_wrote_into_the_card_stays(hub, tmp_path, run_dir):
    pushed(hub, tmp_path, run_dir)
    card = read_back(hub, "README.md").decode().replace("# Evaluation runs", "# Our runs, see the wiki")
    hub.repo(REPO).commit("edit", {"README.md": card.encode()})
    pushed(hub, tmp_path, finished_run(tmp_path / "outputs" / "r2"))
    assert "# Our runs, see the wiki" in read_back(hub, "README.md").decode()


def test_a_large_journal_goes_through_lfs(tmp_path, run_dir):
    with (run_dir / "checkpoint.jsonl").open("ab") as journal:
        journal.writelines(json_line({"kind": "call", "answer": "a word " * 200}) for _ in range(200))
    with hub_server(lfs_from=100_000) as hub:
        pushed(hub, tmp_path, run_dir)
        assert read_back(hub, "toy-env--org--model/r1/checkpoint.jsonl") in hub.lfs.values()


@pytest.mark.parametrize(
    ("token", "words"), [("hf_" + "wrong" * 6, "refused the token of HF_TOKEN"), (None, "no token for the Hub")]
)
def test_a_wrong_or_missing_token_gives_one_clear_line(hub, tmp_path, run_dir, token, words):
    ran = push(hub, tmp_path, run_dir, HF_TOKEN=token)
    assert ran.returncode == 1
    assert words in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert hub.repos == {}
    assert not (run_dir / "published.json").exists()


def test_a_hub_that_stays_away_gives_one_line_with_the_command_that_tries_again(hub, tmp_path, run_dir):
    hub.faults = [{"path": "/api/", "status": 503, "times": 1000}]
    ran = push(hub, tmp_path, run_dir)
    assert ran.returncode == 1
    assert "modal-eval resume" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_hub_that_refuses_connections_gives_one_line(hub, tmp_path, run_dir):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))  # bound but not listening
        ran = push(hub, tmp_path, run_dir, HF_ENDPOINT=f"http://127.0.0.1:{place.getsockname()[1]}")
    assert ran.returncode == 1
    assert "could not be pushed in 8 tries" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


def test_a_run_whose_name_holds_a_secret_is_refused_without_saying_it(hub, tmp_path):
    run_dir = finished_run(tmp_path / "outputs" / "r1", model=f"org/{SECRET}")
    ran = push(hub, tmp_path, run_dir)
    assert ran.returncode == 1
    assert "the name of the run's folder holds the value of $UPSTREAM_KEY" in ran.stderr
    assert SECRET not in ran.stderr
    assert hub.repos == {}


def test_a_run_without_a_score_is_refused(hub, tmp_path, run_dir):
    (run_dir / "metadata.json").unlink()
    ran = push(hub, tmp_path, run_dir)
    assert "modal-eval resume" in ran.stderr
    assert ran.returncode == 1
