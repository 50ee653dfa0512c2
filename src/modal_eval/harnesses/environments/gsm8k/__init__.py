"""GSM8K: 1,319 grade-school word problems; the boxed answer is compared with the number after `####`."""

from __future__ import annotations

import verifiers as vf

from modal_eval.harnesses.envkit.boxed_math import SYSTEM_PROMPT, boxed_math_environment
from modal_eval.harnesses.envkit.data import DataFiles, HubData, Row, load_data, make_dataset

HUB = HubData(
    "openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", subsets=("main",), columns=("question", "answer")
)


def convert(row: Row) -> Row:
    return {"question": row["question"], "answer": str(row["answer"]).rpartition("####")[2].strip().replace(",", "")}


def load_environment(
    revision: str | None = None,
    data_files: DataFiles = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    extraction: str = "boxed",
) -> vf.Environment:
    """`revision` is another commit of openai/gsm8k; `data_files` are local files with its columns.
    `extraction` says where the answer is looked for: boxed, strict or last_number."""
    data = load_data(HUB, revision, data_files)
    return boxed_math_environment(data, make_dataset(data, convert), system_prompt, extraction)
