"""Whether two answers mean the same, by math-verify. In a file of its own: the checking process loads nothing else."""

from __future__ import annotations

PARSING_SECONDS = 5
"""math-verify's own limit for one answer; a tower of powers would take for ever."""


def equivalent(response: str, answer: str) -> bool:
    """Whether both mean the same number, set, interval, tuple, …, as math-verify sees it.

    Only for the main thread of a process: math-verify measures its time with signals.
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=PARSING_SECONDS)
        said = parse(f"\\boxed{{{response}}}", parsing_timeout=PARSING_SECONDS)
        return bool(verify(gold, said, timeout_seconds=PARSING_SECONDS))
    except (Exception, TimeoutException):  # noqa: BLE001 - what cannot be read as mathematics is not the answer
        return False
