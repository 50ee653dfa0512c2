"""IFEval: 541 prompts with instructions that Python can check. The reward is 1 when all of a prompt's are followed.

Metrics: `prompt_level_strict` (the reward) and `prompt_level_loose`; `inst_level_strict` and `inst_level_loose` are the
share of this prompt's instructions. The paper's instruction-level accuracy weights them by `num_instructions`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import verifiers as vf

from modal_eval.harnesses.envkit.data import DataFiles, HubData, Row, load_data, make_dataset

from .checkers import CHECKERS, follows, follows_loosely

HUB = HubData(
    "google/IFEval",
    "966cd89545d6b6acfd7638bc708b98261ca58e84",
    split="train",
    columns=("key", "prompt", "instruction_id_list", "kwargs"),
)
MODES = ("strict", "loose")


def convert(row: Row) -> Row:
    # The Hub's copy fills every argument that an instruction does not have with null.
    arguments = [{name: value for name, value in each.items() if value is not None} for each in row["kwargs"]]
    names = row["instruction_id_list"]
    if unknown := set(names) - set(CHECKERS):
        raise ValueError(f"instructions {sorted(unknown)} are none of IFEval's {len(CHECKERS)}")
    if len(names) != len(arguments):
        raise ValueError(f"{len(names)} instructions have {len(arguments)} kwargs")
    info = {"key": row["key"], "instruction_id_list": row["instruction_id_list"], "kwargs": json.dumps(arguments)}
    return {"question": row["prompt"], "answer": "", "info": info}


def load_environment(
    revision: str | None = None, data_files: DataFiles = None, mode: str = "strict", system_prompt: str | None = None
) -> vf.Environment:
    """`mode` says which of the two prompt-level verdicts is the reward."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} does not exist; there are {' and '.join(MODES)}")
    data = load_data(HUB, revision, data_files)
    parser = vf.Parser(extract_fn=lambda text: text.split("</think>")[-1].strip())
    weights = [float(mode == "strict"), float(mode == "loose"), 0.0, 0.0, 0.0]
    environment = vf.SingleTurnEnv(
        eval_dataset=make_dataset(data, convert),
        system_prompt=system_prompt,
        parser=parser,
        rubric=vf.Rubric(funcs=list(METRICS), weights=weights, parser=parser),
    )
    environment.data_source = data.source
    return environment


def verdicts(check: Callable[..., bool], parser: Any, completion: Any, info: Row) -> list[bool]:
    """One verdict per instruction of the prompt."""
    text = parser.parse_answer(completion) or ""
    instructions = zip(info["instruction_id_list"], json.loads(info["kwargs"]), strict=True)
    return [check(text, name, arguments) for name, arguments in instructions]


def prompt_level_strict(parser: Any, completion: Any, info: Any) -> float:
    return float(all(verdicts(follows, parser, completion, info)))


def prompt_level_loose(parser: Any, completion: Any, info: Any) -> float:
    return float(all(verdicts(follows_loosely, parser, completion, info)))


def inst_level_strict(parser: Any, completion: Any, info: Any) -> float:
    followed = verdicts(follows, parser, completion, info)
    return sum(followed) / len(followed)


def inst_level_loose(parser: Any, completion: Any, info: Any) -> float:
    followed = verdicts(follows_loosely, parser, completion, info)
    return sum(followed) / len(followed)


def num_instructions(info: Any) -> float:
    return float(len(info["instruction_id_list"]))


METRICS = (prompt_level_strict, prompt_level_loose, inst_level_strict, inst_level_loose, num_instructions)
