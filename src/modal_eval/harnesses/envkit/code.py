"""Code answers: taking the program out of an answer, and running it in the sandbox without holding up the harness."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, TypeVar

from modal_eval.scoring.sandbox import BACKENDS, Sandbox

Result = TypeVar("Result")
FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)
_SLOTS: dict[int, asyncio.Semaphore] = {}


def make_sandbox(backend: str) -> Sandbox:
    """The sandbox of that name, after it has run a program: without one there is no score, so nothing is generated."""
    if backend not in BACKENDS:
        raise ValueError(
            f"sandbox_backend={backend!r} is not there; use 'local' (bubblewrap), or 'process' for limits without walls"
        )
    sandbox = Sandbox(backend)
    sandbox.check()
    return sandbox


def extract_code(text: str) -> str:
    """The last fenced block after the thoughts; nothing where there is none."""
    blocks = FENCE.findall(text.split("</think>")[-1])
    return blocks[-1].strip("\n") if blocks else ""


async def in_sandbox(work: Callable[[], Result]) -> Result:
    """Run blocking `work` in a thread, at most one per processor: more would only make each other time out."""
    loop = asyncio.get_running_loop()
    slots = _SLOTS.setdefault(id(loop), asyncio.Semaphore(os.cpu_count() or 1))
    async with slots:
        return await asyncio.to_thread(work)


def same_output(expected: str, printed: str) -> bool:
    """LiveCodeBench's comparison: line by line without outer blanks, and where a line differs, number by number.

    Numbers are compared as decimals, so `1.0` equals `1`, and 18 digits are not rounded away.
    """
    wanted = [line.strip() for line in expected.strip().splitlines()]
    got = [line.strip() for line in printed.strip().splitlines()]
    return len(wanted) == len(got) and all(map(_same_line, wanted, got))


def _same_line(wanted: str, got: str) -> bool:
    if wanted == got:
        return True
    try:
        return [Decimal(word) for word in wanted.split()] == [Decimal(word) for word in got.split()]
    except InvalidOperation:
        return False


def same_value(expected: Any, value: Any) -> bool:
    """Equality of JSON data in which `True` is not 1, as a printed answer would show."""
    if isinstance(expected, bool) or isinstance(value, bool):
        return expected is value
    if isinstance(expected, list) and isinstance(value, list):
        return len(expected) == len(value) and all(map(same_value, expected, value))
    if isinstance(expected, dict) and isinstance(value, dict):
        return expected.keys() == value.keys() and all(same_value(expected[key], value[key]) for key in expected)
    if type(expected) in (int, float) and type(value) in (int, float):
        return bool(expected == value)
    return type(expected) is type(value) and bool(expected == value)
