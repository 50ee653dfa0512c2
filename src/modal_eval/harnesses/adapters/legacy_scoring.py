"""Hear what verifiers' rubrics swallow: a reward function that raises is logged there and counted as 0."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAILURES = "modal_eval_scoring_failures"


@dataclass(frozen=True)
class Failure:
    """A reward function that raised for one rollout."""

    name: str
    weight: float
    """0 for a metric, whose loss does not touch the reward."""
    error: Exception


def failed_functions(state: Any) -> list[Failure]:
    return list(state.get(FAILURES) or [])


def report_scoring_errors(env: Any) -> None:
    """Make every reward function of an environment, its rubric groups and its members note its errors."""
    for member in getattr(env, "envs", []):
        report_scoring_errors(member)
    _wrap_rubric(env.rubric)


def _wrap_rubric(rubric: Any) -> None:
    for member in getattr(rubric, "rubrics", []):
        _wrap_rubric(member)
    for position, function in enumerate(rubric.funcs):
        weight = rubric.weights[position] if position < len(rubric.weights) else 1.0
        rubric.funcs[position] = _noting(function, weight, grouped=rubric._is_group_func(function))


def _noting(function: Callable[..., Any], weight: float, *, grouped: bool) -> Callable[..., Any]:
    """`function` under its own name, that writes an error into the rollout's state before it raises it.

    Rubrics pass a function the arguments that its signature names, so the wrapper's names the state as well.
    """
    if getattr(function, "notes_errors", False):
        return function
    wanted = "states" if grouped else "state"
    signature = inspect.signature(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    asked = wanted in signature.parameters or takes_any

    @functools.wraps(function)
    async def call(**arguments: Any) -> Any:
        state = arguments[wanted]
        states = state if grouped else [state]
        if not asked:
            del arguments[wanted]
        try:
            result = function(**arguments)
            if inspect.isawaitable(result):
                result = await result
            return _checked_group(result, len(states)) if grouped else float(result)
        except Exception as error:
            for each in states:
                each.setdefault(FAILURES, []).append(Failure(call.__name__, weight, error))
            raise

    if not asked:
        extra = inspect.Parameter(wanted, inspect.Parameter.KEYWORD_ONLY)
        signature = signature.replace(parameters=[*signature.parameters.values(), extra])
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.notes_errors = True  # type: ignore[attr-defined]
    if not hasattr(function, "__name__"):
        call.__name__ = repr(function)
    return call


def _checked_group(result: Any, expected: int) -> list[float]:
    scores = [float(score) for score in result]
    if len(scores) != expected:
        raise ValueError(f"a group's reward function returned {len(scores)} scores for {expected} rollouts")
    return scores
