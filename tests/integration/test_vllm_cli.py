"""The whole command line in front of real vLLM on the CPU: `make test-vllm`."""

import json
from collections import Counter

import pytest

from tests.support.cli import finished, kill
from tests.support.data import data_file
from tests.support.vllm_cpu import ENVIRONMENT, converted_model, marks

pytestmark = marks

KEYS = [(example, rollout) for example in range(8) for rollout in range(2)]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return converted_model(tmp_path_factory.mktemp("models"))


def calls(cli):
    """The journal's finished calls; a torn last line is none."""
    journal = cli.run_dir / "checkpoint.jsonl"
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.is_file() else []
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "answer"]


def test_gsm8k_on_vllm_survives_a_kill_and_goes_on_with_what_is_missing(cli, mark, model_folder):
    cli.env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    process = cli.start(
        "run", "-m", str(model_folder), "-b", "gsm8k", "--run-dir", str(cli.run_dir),
        f"--infra.environment={ENVIRONMENT}", "--infra.startup_timeout=600", "--vllm.dtype=float32",
        "--vllm.enforce_eager", "--vllm.max_model_len=2048", f"--env.data_files={data_file('gsm8k/test.jsonl')}",
        "--eval.num_examples=8", "--eval.rollouts=2", "--eval.max_concurrent=4", "--sampling.max_tokens=32",
        "--sampling.seed=7",
    )  # fmt: skip
    cli.wait_for(lambda: len(calls(cli)) >= 3, process, within=600)
    assert process.poll() is None, process.communicate()
    kill(process)
    assert mark.wait_until_gone() == {}
    kept = calls(cli)
    assert 0 < len(kept) < len(KEYS)
    finished(cli.start("resume", str(cli.run_dir)), 0)
    rows = cli.rows()
    assert [(row["example_id"], row["rollout"]) for row in rows] == KEYS
    assert all(row["completion"][0]["content"] for row in rows)
    paid = Counter(entry["tag"] for entry in calls(cli))
    assert paid == Counter({f"{example}/{rollout}": 1 for example, rollout in KEYS})
    assert calls(cli)[: len(kept)] == kept
    assert cli.metadata()["server"]["version"].startswith("0.32.0")
    assert json.loads(cli("status", "--json").stdout) == []
