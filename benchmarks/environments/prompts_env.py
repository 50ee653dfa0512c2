"""Prompts of a file, each asked once; whatever is answered is right: only the asking is measured."""

from __future__ import annotations

import json
from pathlib import Path

import verifiers as vf
from datasets import Dataset


def load_environment(file: str) -> vf.Environment:
    rows = [{"question": prompt, "answer": ""} for prompt in json.loads(Path(file).read_text(encoding="utf-8"))]

    def answered(completion: list) -> float:
        return float(bool(completion))

    return vf.SingleTurnEnv(eval_dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[answered]))
