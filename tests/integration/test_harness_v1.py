"""verifiers' tasksets: plain ones are asked directly, the others are played in the package's own runtime."""

from __future__ import annotations

from pathlib import Path

import pytest

from modal_eval.environments import ensure_environment
from modal_eval.harnesses import describe
from tests.support.chat import Call, Reply, chat_server
from tests.support.harness import OUR_KEYS, SEED_KEYS, job, run


def say_back(call: Call) -> Reply:
    return Reply(call.last.removeprefix("say "))


def test_a_tasksets_row_has_the_same_columns(tmp_path: Path) -> None:
    with chat_server(say_back) as server:
        ran = run(job("plain-taskset", server.url, "v1", env_args={"count": 1}), tmp_path)
    row = ran.rows[0]
    assert list(row) == [*SEED_KEYS, *OUR_KEYS, "said", "length"]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["completion"] == [{"role": "assistant", "content": "word0"}]
    assert (row["reward"], row["length"], row["answer"]) == (1.0, 5.0, "word0")
    assert row["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


def test_a_tasksets_start_names_its_interface(tmp_path: Path) -> None:
    a_job = job("plain-taskset", "http://127.0.0.1:9/v1", "v1", num_examples=2)
    start = describe(a_job, tmp_path, ensure_environment("verifiers-v1"))
    assert start.harness == {"name": "verifiers", "version": "0.4.0", "api": "v1"}
    assert (start.total_examples, start.data["examples"]) == (2, 4)


def test_a_tasksets_rollouts_are_tagged_and_have_their_own_seed(tmp_path: Path) -> None:
    sampling = {"temperature": 0.5, "max_tokens": 20, "seed": 7, "top_k": 5}
    with chat_server(say_back) as server:
        a_job = {"env_args": {"count": 2}, "rollouts": 2, "sampling": sampling, "done": frozenset({(1, 0)})}
        run(job("plain-taskset", server.url, "v1", **a_job), tmp_path)
    assert server.tags == ["0/0", "0/1", "1/1"]
    for call in server.calls:
        sent = {key: call.body[key] for key in sampling}
        assert sent == {**sampling, "seed": 7 + int(call.tag.split("/")[1])}


def test_faults_of_server_and_scorer_leave_a_tasksets_rollout_unscored(tmp_path: Path) -> None:
    def fail_for_one(call: Call) -> Reply:
        return Reply("out of memory", status=500) if call.last == "say word1" else say_back(call)

    with chat_server(fail_for_one) as server:
        ran = run(job("plain-taskset", server.url, "v1"), tmp_path)
    rows = ran.by_key()
    assert ran.rewards() == {(0, 0): 1.0, (1, 0): None, (2, 0): 1.0, (3, 0): None}
    assert rows[1, 0]["error"]["fault"] == "server"
    assert rows[3, 0]["error"]["fault"] == "scoring"
    assert "the checker crashed" in rows[3, 0]["error"]["message"]


def test_an_empty_or_overlong_tasksets_answer_is_scored(tmp_path: Path) -> None:
    def answer(call: Call) -> Reply:
        return Reply("maximum context length is 8", status=400) if call.last == "say word1" else Reply("")

    with chat_server(answer) as server:
        ran = run(job("plain-taskset", server.url, "v1", num_examples=2), tmp_path)
    assert ran.rewards() == {(0, 0): 0.0, (1, 0): 0.0}
    assert [row["truncated"] for _, row in sorted(ran.by_key().items())] == [False, True]


@pytest.mark.timeout(180)
def test_a_taskset_that_needs_a_runtime_is_played_in_verifiers_own(tmp_path: Path) -> None:
    with chat_server(say_back) as server:
        ran = run(job("runtime-taskset", server.url, "v1", rollouts=2), tmp_path)
    assert ran.rewards() == {(0, 0): 1.0, (0, 1): 1.0}
    assert {call.tag for call in server.calls} == {"0/0", "0/1"}
    assert ran.rows[0]["completion"] == [{"role": "assistant", "content": "word0"}]
    log = (tmp_path / "logs" / "vf_eval.log").read_text()
    assert "played in verifiers' runtime" in log


@pytest.mark.timeout(180)
def test_a_fault_of_the_server_in_verifiers_own_runtime_is_unscored(tmp_path: Path) -> None:
    with chat_server(lambda call: Reply("out of memory", status=500)) as server:
        ran = run(job("runtime-taskset", server.url, "v1"), tmp_path)
    assert ran.rewards() == {(0, 0): None}
    assert ran.rows[0]["error"]["fault"] == "server"
