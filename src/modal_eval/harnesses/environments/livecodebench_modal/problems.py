"""LiveCodeBench's rows: their tests, packed in several ways, and the question as the benchmark's authors put it."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator
import io, sys, json
sys.setrecursionlimit(50000)
"""
"""The names that LiveCodeBench's own checker provides, since sites such as LeetCode do."""

FORMAT_WITH_STARTER = "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
FORMAT_WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)


@dataclass(frozen=True, slots=True)
class Test:
    """One test: text in and out for a program, arguments and a value for a function."""

    stdin: str
    expected_output: str
    arguments: list[Any]
    expected_value: Any


@dataclass(frozen=True, slots=True)
class Problem:
    tests: list[Test]
    function: str | None
    """`None` for a program that reads its standard input."""


def as_problem(row: Row) -> Problem:
    """The row's tests, public and hidden."""
    metadata = row["metadata"] if isinstance(row["metadata"], dict) else json.loads(row["metadata"] or "{}")
    function = metadata.get("func_name")
    cases = unpack(row["public_test_cases"]) + unpack(row["private_test_cases"])
    if not cases:
        raise ValueError(f"problem {row['question_id']} has no tests")
    return Problem([make_test(case, function) for case in cases], function)


def make_test(case: Row, function: str | None) -> Test:
    if function is None:
        return Test(case["input"], case["output"], [], None)
    arguments = [json.loads(line) for line in case["input"].split("\n") if line.strip()]
    return Test("", "", arguments, json.loads(case["output"]))


def unpack(cases: Any) -> list[Row]:
    """Tests as a list, as JSON, or as the Hub's base64 of zlib of a pickled JSON text."""
    if isinstance(cases, list):
        return cases
    if not cases:
        return []
    try:
        tests: list[Row] = json.loads(cases)
    except ValueError:
        packed = zlib.decompress(base64.b64decode(cases.encode()))
        tests = json.loads(TextUnpickler(io.BytesIO(packed)).load())
    return tests


class TextUnpickler(pickle.Unpickler):
    """Loads plain data only: a pickle that names a class or a function could run code of the file's author."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"hidden tests are a text, but this file wants {module}.{name}; do not trust it")


def in_window(row: Row, start: str | None, end: str | None, difficulty: str | None) -> bool:
    """Whether the contest was held from `start` to `end`, both included, and has the difficulty."""
    day = str(row["contest_date"])[:10]
    return (not start or day >= start) and (not end or day <= end) and difficulty in (None, row["difficulty"])


def question(row: Row) -> str:
    """The benchmark's own prompt for instruction-tuned models."""
    if row["starter_code"]:
        form, code = FORMAT_WITH_STARTER, row["starter_code"]
    else:
        form, code = FORMAT_WITHOUT_STARTER, "# YOUR CODE HERE"
    return (
        f"### Question:\n{row['question_content']}\n\n### Format: {form}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )
