"""AIME 2025: the 30 problems of both papers; every answer is an integer from 0 to 999."""

from __future__ import annotations

import re

import verifiers as vf

from modal_eval.harnesses.envkit.boxed_math import SYSTEM_PROMPT, boxed_math_environment
from modal_eval.harnesses.envkit.data import DataFiles, HubData, Row, first_key, load_data, make_dataset

HUB = HubData(
    "opencompass/AIME2025",
    "a6ad95f611d72cf628a80b58bd0432ef6638f958",
    subsets=("AIME2025-I", "AIME2025-II"),
    columns=("question|problem", "answer"),
)


def convert(row: Row) -> Row:
    # The Hub's copy writes two of the answers with a degree sign.
    answer = re.sub(r"[^\d]", "", str(row["answer"]))
    if not answer:
        raise ValueError(f"answer {row['answer']!r} is no integer from 0 to 999, as every answer of AIME is")
    return {"question": f"{first_key(row, 'question', 'problem')}\n{SYSTEM_PROMPT}", "answer": answer}


def load_environment(
    revision: str | None = None,
    data_files: DataFiles = None,
    system_prompt: str | None = None,
    extraction: str = "boxed",
) -> vf.Environment:
    """The instruction stands in the question, so there is no system prompt unless one is given. `extraction` is boxed,
    strict or last_number."""
    data = load_data(HUB, revision, data_files)
    return boxed_math_environment(data, make_dataset(data, convert), system_prompt, extraction)
