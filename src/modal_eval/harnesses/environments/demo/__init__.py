"""The project's own small benchmark: 84 questions of three kinds, made for models that run on two processor cores.

* `arithmetic`: one-step word problems; the last number of the answer counts
* `code`: tiny Python functions, called in the sandbox with arguments that the model never saw
* `format`: an answer of a demanded form; Python checks the form exactly

Nothing is downloaded. The kinds alternate, so that the first few examples are a fair sample. A model of 135 million
parameters gets some of each kind right and some wrong: the number moves when the model, the chat template or the
sampling changes, which is what a demonstration is for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import verifiers as vf

from modal_eval.harnesses.envkit.code import ROW_INFO, checked_sandbox, in_sandbox, same_value
from modal_eval.harnesses.envkit.data import Data, Row, make_dataset
from modal_eval.scoring.sandbox import Limits, Sandbox

from .arithmetic_items import ARITHMETIC
from .code_items import CODE, CodeItem
from .format_items import FORMAT

KINDS = ("arithmetic", "code", "format")
LIMITS = Limits(cpu_s=2, memory_bytes=512 << 20)


def load_environment(kinds: Sequence[str] = KINDS, sandbox_backend: str = "local") -> vf.Environment:
    """`kinds` picks among arithmetic, code and format."""
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds={sorted(unknown)} do not exist; there are {', '.join(KINDS)}")
    rows = [row for row in all_rows() if row["info"]["env_id"] in kinds]
    sandbox = checked_sandbox(sandbox_backend)
    data = Data(rows, {"source": "builtin", "path": "demo", "sha256": items_digest(), "rows": len(rows)})
    environment = vf.SingleTurnEnv(eval_dataset=make_dataset(data, lambda row: row), rubric=KindRubric(sandbox))
    environment.data_source = data.source
    return environment


def all_rows() -> list[Row]:
    """One row an item, the kinds in turn. verifiers routes and groups by `info.env_id`; it becomes the row's `task`."""
    questions = {
        "arithmetic": [f"{text} Answer in one short sentence." for text, _ in ARITHMETIC],
        "code": [code_question(item) for item in CODE],
        "format": [item.prompt for item in FORMAT],
    }
    answers = {"arithmetic": [str(number) for _, number in ARITHMETIC]}
    columns = [
        [
            {
                "question": question,
                "answer": answers[kind][number] if kind in answers else "",
                "info": {"env_id": kind, "item": number},
            }
            for number, question in enumerate(questions[kind])
        ]
        for kind in KINDS
    ]
    return list(chain.from_iterable(zip(*columns, strict=True)))


def code_question(item: CodeItem) -> str:
    return f"Complete this Python function. It {item.task}.\n```python\ndef {item.signature}:\n```"


def items_digest() -> str:
    """Digest of the items' own source: another wording or another check is another benchmark."""
    digest = hashlib.sha256()
    for name in ("__init__.py", "arithmetic_items.py", "code_items.py", "format_items.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


class KindRubric(vf.Rubric):
    """Scores each kind by its own rule and names the metric after the kind, so that averages are per kind."""

    def __init__(self, sandbox: Sandbox) -> None:
        async def correct(completion: Any, info: Any, answer: str, state: Any) -> float:
            if info["env_id"] == "code":
                state[ROW_INFO] = {"sandbox": sandbox.facts()}
            return float(await is_correct(last_message(completion), info, answer, sandbox))

        super().__init__(funcs=[correct])
        self.sandbox = sandbox

    async def teardown(self) -> None:
        await super().teardown()
        self.sandbox.close()

    async def score_rollout(self, state: Any) -> None:
        await super().score_rollout(state)
        name_after_kind(state)

    async def score_group(self, states: list[Any]) -> None:
        await super().score_group(states)
        for state in states:
            name_after_kind(state)


def name_after_kind(state: Any) -> None:
    state["metrics"] = {state["info"]["env_id"]: state["metrics"]["correct"]}


def last_message(completion: Any) -> str:
    return vf.Parser().parse_answer(completion) or ""


async def is_correct(text: str, info: Row, answer: str, sandbox: Sandbox) -> bool:
    if info["env_id"] == "arithmetic":
        return last_number(text) == float(answer)
    if info["env_id"] == "format":
        return FORMAT[info["item"]].check(text.strip())
    item = CODE[info["item"]]
    code = first_block(text)
    return bool(code) and await in_sandbox(lambda: passes(item, code, sandbox), sandbox)


def last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(numbers[-1]) if numbers else None


def first_block(text: str) -> str:
    """The first fenced block, or the whole answer: small models go on with examples of use in further blocks."""
    blocks = re.findall(r"```[^\n]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return blocks[0] if blocks else text


def passes(item: CodeItem, code: str, sandbox: Sandbox) -> bool:
    """Whether every hidden call returns what it should; the comparison happens out here."""
    outcomes = sandbox.call_function(code, item.function, [arguments for arguments, _ in item.calls], LIMITS)
    return all(
        outcome.status == "ok" and same_value(expected, outcome.value)
        for outcome, (_, expected) in zip(outcomes, item.calls, strict=True)
    )
