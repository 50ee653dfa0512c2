"""What a rollout's outcome becomes in `results.jsonl`, and how the adapter tells what it is doing."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modal_eval.harnesses.adapters.channel import plain
from modal_eval.harnesses.adapters.common import (
    CallLog,
    Example,
    Job,
    Outcome,
    digest_of_examples,
    digest_of_prompts,
    fault,
    row,
)
from modal_eval.harnesses.adapters.lm_eval_harness_votes import extracted
from modal_eval.harnesses.adapters.stepping import CURRENT, PAGE, StepPage, marking_task_factory

PACKAGE = Path(__file__).parents[2] / "src" / "modal_eval"
DIGEST = """
import sys
sys.path.insert(0, f"{sys.argv[1]}/modal_eval/harnesses/environments")
sys.path.insert(0, sys.argv[1])
from modal_eval.harnesses.adapters.common import digest_of_module
print(digest_of_module(sys.argv[2]))
"""
EXAMPLE = Example(3, [{"role": "user", "content": "hi"}], "42", {"kind": "x"})
SAID = [{"role": "assistant", "content": "42"}]


def a_job(**sampling: Any) -> Job:
    return Job("me/my-env@1.0", {}, "", "m", sampling, None, 1, 1, 1.0, "auto", set(), {}, [])


def test_an_error_takes_the_reward_away() -> None:
    line = row(EXAMPLE, 1, Outcome(SAID, reward=0.0, error=fault("server", "HTTP 500", "APIError")))
    assert (line["reward"], line["has_error"]) == (None, 1.0)
    assert line["error"] == {"type": "APIError", "message": "HTTP 500", "fault": "server"}


@pytest.mark.parametrize("reward", [None, float("nan"), float("inf")])
def test_a_reward_that_is_no_number_is_unscored(reward: float | None) -> None:
    line = row(EXAMPLE, 0, Outcome(SAID, reward=reward))
    assert line["reward"] is None
    assert line["error"]["fault"] == "scoring"


def test_a_metric_cannot_replace_a_column() -> None:
    line = row(
        EXAMPLE, 0, Outcome(SAID, reward=1.0, metrics={"reward": 0.5, "answer": 1.0, "num_turns": 9.0, "own": 2})
    )
    assert (line["reward"], line["answer"], line["num_turns"], line["own"]) == (1.0, "42", 0, 2)
    assert (line["metric_reward"], line["metric_answer"]) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("completion", "empty"),
    [
        ([], True),
        ([{"role": "assistant", "content": " \n"}], True),
        ([{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], False),
        ([{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}], False),
        ([*SAID, {"role": "user", "content": "go on"}], False),
    ],
)
def test_empty_means_that_the_model_said_nothing_last(completion: list[Any], empty: bool) -> None:
    assert row(EXAMPLE, 0, Outcome(completion, reward=0.0))["empty"] is empty


def test_an_answer_that_ended_for_its_length_is_truncated() -> None:
    log = CallLog()
    log.record("length", None)
    assert row(EXAMPLE, 0, Outcome(SAID, reward=1.0, calls=log))["truncated"] is True


def test_a_row_is_json_whatever_the_environment_put_into_it() -> None:
    line = row(Example(0, "p", {1, 2}, {"half an emoji": "\ud83d", 5: object}), 0, Outcome(SAID, reward=1.0))
    again = json.loads(json.dumps(line, allow_nan=False))
    assert again["info"]["half an emoji"] == "?"
    assert plain(float("nan")) is None


def test_the_message_of_an_error_without_words_is_its_causes() -> None:
    error = RuntimeError()
    error.__cause__ = ValueError("status 503")
    assert fault("server", error) == {"type": "RuntimeError", "message": "status 503", "fault": "server"}


def test_servers_own_parameters_travel_beside_openais() -> None:
    sent = a_job(temperature=0.5, seed=10, top_k=5, max_tokens=7, extra_body={"min_p": 0.1}).sampling_for(2)
    assert sent == {"temperature": 0.5, "seed": 12, "extra_body": {"min_p": 0.1, "top_k": 5, "max_tokens": 7}}
    assert a_job(temperature=0.0).sampling_for(2) == {"temperature": 0.0}


def test_a_hub_id_names_its_module() -> None:
    assert a_job().module_name == "my_env"


def test_a_changed_example_changes_the_digest() -> None:
    assert digest_of_examples([EXAMPLE]) == digest_of_examples([Example(3, EXAMPLE.prompt, "42", {"kind": "x"})])
    assert digest_of_examples([EXAMPLE]) != digest_of_examples([Example(3, EXAMPLE.prompt, "43", {"kind": "x"})])


@pytest.fixture
def page() -> Iterator[StepPage]:
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        yield StepPage(file.fileno())


async def test_the_page_names_the_rollout_whose_code_runs_and_nobody_between_steps(page: StepPage) -> None:
    asyncio.get_running_loop().set_task_factory(marking_task_factory(page))
    seen = []

    async def inner() -> None:
        seen.append(page.read())

    async def rollout(example_id: int) -> None:
        CURRENT.set((example_id, 1))
        task = asyncio.create_task(inner())  # made on behalf of the rollout, as wait_for and gather do
        await asyncio.sleep(0)
        await task

    await asyncio.gather(rollout(4), rollout(5))
    assert [step and step[0] for step in seen] == [(4, 1), (5, 1)]
    assert page.read() is None


async def test_a_marked_task_is_cancelled_and_times_out_like_any_other(page: StepPage) -> None:
    asyncio.get_running_loop().set_task_factory(marking_task_factory(page))
    CURRENT.set((1, 0))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.create_task(asyncio.sleep(60)), 0.01)
    failing = asyncio.create_task(asyncio.sleep(0, result=7))
    assert await failing == 7
    assert page.read() is None
    CURRENT.set(None)


@pytest.mark.parametrize(
    ("filtered", "metric", "answer"),
    [
        ({"strict-match": ["[invalid]"], "flexible-extract": ["18"]}, "exact_match,flexible-extract", "18"),
        ({"strict-match": ["[invalid]"], "flexible-extract": ["18"]}, "exact_match,strict-match", ""),
        ({"none": ["the whole text"]}, "exact_match,none", None),
        ({"none": [[-1.0, False], [-2.0, False]]}, "acc,none", None),
        ({"custom": [["a", "b"]]}, "pass@1,custom", None),
        ({}, None, None),
    ],
)
def test_what_lm_evals_filter_found_votes_and_what_it_only_hands_on_does_not(
    filtered: Any, metric: str | None, answer: str | None
) -> None:
    assert extracted(filtered, metric) == answer


def test_a_row_says_what_was_extracted_only_where_an_answer_was_looked_for() -> None:
    example = Example(0, "p", "a", {})
    assert "extracted" not in row(example, 0, Outcome(reward=1.0))
    assert row(example, 0, Outcome(reward=0.0, extracted=""))["extracted"] == ""


def test_how_examples_are_scored_is_no_part_of_what_they_are() -> None:
    def digests(prompt: str = "p", answer: str = "a", **info: Any) -> tuple[str, str]:
        examples = [Example(0, prompt, answer, {"id": 1, **info})]
        return digest_of_examples(examples, without=["sandbox_backend"]), digest_of_prompts(examples)

    assert digests() == digests(sandbox_backend="modal")
    assert digests()[0] != digests(level=2)[0]
    assert digests()[0] != digests(answer="b")[0]
    assert digests()[1] == digests(answer="b")[1]
    assert digests()[1] != digests(prompt="q")[1]


@pytest.mark.parametrize(
    "changed", ["harnesses/envkit/equivalence.py", "scoring/battery.py", "harnesses/environments/gsm8k/__init__.py"]
)
def test_a_change_of_what_scores_an_environment_of_ours_gives_it_another_digest(tmp_path: Path, changed: str) -> None:
    copy = tmp_path / "modal_eval"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def digest() -> str:
        command = [sys.executable, "-c", DIGEST, str(tmp_path), "gsm8k"]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    before = digest()
    assert before == digest()
    assert before.startswith("sha256:")
    with (copy / changed).open("a") as file:
        file.write("# another rule\n")
    assert digest() != before
