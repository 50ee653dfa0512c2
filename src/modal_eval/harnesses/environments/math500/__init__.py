"""MATH-500: 500 competition problems from seven subjects; the boxed answer is compared with the reference."""

from __future__ import annotations

import verifiers as vf

from modal_eval.harnesses.envkit.boxed_math import SYSTEM_PROMPT, boxed_math_environment
from modal_eval.harnesses.envkit.data import DataFiles, HubData, Row, load_data, make_dataset

HUB = HubData("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", columns=("problem", "answer"))


def convert(row: Row) -> Row:
    info = {name: row[name] for name in ("subject", "level", "unique_id") if name in row}
    return {"question": row["problem"], "answer": row["answer"], "info": info}


def load_environment(
    revision: str | None = None,
    data_files: DataFiles = None,
    system_prompt: str | None = SYSTEM_PROMPT,
    extraction: str = "boxed",
) -> vf.Environment:
    """`revision` is another commit of HuggingFaceH4/MATH-500; `data_files` are local files with its columns.
    `extraction` says where the answer is looked for: boxed, strict or last_number."""
    data = load_data(HUB, revision, data_files)
    return boxed_math_environment(data, make_dataset(data, convert), system_prompt, extraction)
