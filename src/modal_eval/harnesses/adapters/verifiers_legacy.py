"""verifiers with `load_environment()` (0.1.10 to 0.3): each rollout driven by itself, and no error taken for a 0."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import openai
import verifiers as vf
from verifiers.clients import OpenAIChatCompletionsClient

from modal_eval.harnesses.adapters.common import (
    CALLS,
    OVERLONG_PHRASES,
    ROLLOUT_HEADER,
    ROW_INFO,
    CallLog,
    Example,
    Job,
    Outcome,
    SetupError,
    digest_of_module,
    fault,
    package_version,
)
from modal_eval.harnesses.adapters.legacy_scoring import failed_functions, report_scoring_errors
from modal_eval.harnesses.adapters.stepping import CURRENT

logger = logging.getLogger("modal_eval.harness")
KEPT_CONNECTIONS = 8
"""httpcore looks at every open connection for each idle one, at each call: with 64 kept, that took 9 ms a call."""


class RolloutClient(OpenAIChatCompletionsClient):
    """verifiers' client with three corrections and a memory.

    An empty answer is the model's answer and is scored (verifiers makes it an error). Every server's way to say that a
    prompt is too long is understood, not only some. Why the model stopped and what it used is kept for the row.
    """

    async def get_native_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().get_native_response(*args, **kwargs)
        except openai.BadRequestError as error:
            text = error.response.text.lower()
            if any(phrase in text for phrase in OVERLONG_PHRASES):
                raise vf.OverlongPromptError(error.response.text[:500]) from error
            raise

    async def raise_from_native_response(self, response: Any) -> None:
        choices = getattr(response, "choices", None)
        if choices and len(choices) == 1:
            message = choices[0].message
            if message.content is None and not message.tool_calls:
                message.content = ""
            if (log := CALLS.get()) is not None:
                log.record(choices[0].finish_reason, response.usage)
            return
        await super().raise_from_native_response(response)


async def tag_request(request: httpx.Request) -> None:
    """Tell the proxy which rollout a call belongs to."""
    if (tag := CURRENT.get()) is not None:
        request.headers[ROLLOUT_HEADER] = f"{tag[0]}/{tag[1]}"


def make_client(job: Job) -> RolloutClient:
    """A client that neither retries nor gives up: the proxy does the one, the rollout's time limit the other."""
    http = httpx.AsyncClient(
        timeout=httpx.Timeout(None, connect=30.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=KEPT_CONNECTIONS),
        event_hooks={"request": [tag_request]},
        trust_env=False,
    )
    return RolloutClient(
        openai.AsyncOpenAI(base_url=job.base_url, api_key="none", max_retries=0, timeout=None, http_client=http)
    )


class LegacyBackend:
    """An environment that `load_environment()` returned."""

    harness = "verifiers"
    asks_ahead = False
    api = "legacy"

    def __init__(self, job: Job, version: str) -> None:
        self.version = version
        self._job = job
        self._env: Any = vf.load_environment(job.env_id, **job.env_args)
        self._inputs: list[dict[str, Any]] = [dict(line) for line in self._env.get_eval_dataset().to_list()]
        self.examples = numbered([example_of(line) for line in self._inputs], job.env_id)
        self.grouped = scores_groups(self._env)
        self.environment_version = package_version(job.module_name)
        self.environment_sha256 = digest_of_module(job.module_name)
        self.data = dict(getattr(self._env, "data_source", None) or {})
        self._scores_later = job.phase == "generate" and bool(getattr(self._env, "scores_later", False))
        report_scoring_errors(self._env)

    async def open(self) -> None:
        self._client = make_client(self._job)
        self._slots = asyncio.Semaphore(self._job.max_concurrent)

    async def close(self) -> None:
        await self._env._teardown()
        await self._client.client.close()

    async def run_one(self, position: int, rollout: int, calls: CallLog) -> Outcome:
        outcome, state = await self._generate(position, rollout, calls)
        if state is not None and self._scores_later:
            outcome.pending = True
            await self._env.rubric.cleanup(state)
        elif state is not None:
            await self._score([state], [outcome])
        return outcome

    async def run_group(self, position: int, rollouts: Sequence[int], calls: Sequence[CallLog]) -> list[Outcome]:
        pairs = await asyncio.gather(
            *(self._tagged(position, rollout, log) for rollout, log in zip(rollouts, calls, strict=True))
        )
        outcomes = [outcome for outcome, _ in pairs]
        states = [state for _, state in pairs if state is not None]
        if len(states) == len(pairs):
            await self._score(states, outcomes)
            return outcomes
        message = f"{len(pairs) - len(states)} of the example's {len(pairs)} rollouts failed, which are scored together"
        for outcome, state in pairs:
            if state is not None:
                outcome.error = fault("environment", message, "IncompleteGroup")
        return outcomes

    async def _tagged(self, position: int, rollout: int, calls: CallLog) -> tuple[Outcome, Any]:
        CURRENT.set((self.examples[position].example_id, rollout))
        CALLS.set(calls)
        async with self._slots:
            return await self._generate(position, rollout, calls)

    async def _generate(self, position: int, rollout: int, calls: CallLog) -> tuple[Outcome, Any]:
        """The outcome so far and, when it can be scored, verifiers' state."""
        outcome = Outcome(calls=calls)
        started = time.perf_counter()
        arguments = (self._inputs[position], self._client, self._job.model, self._sampling(rollout))
        try:
            if has_own_scoring(self._env):
                state = await self._env._run_rollout_state(*arguments)
            else:
                state = await self._env.rollout(*arguments)
        except Exception as error:
            logger.exception("rollout %s/%s", self.examples[position].example_id, rollout)
            outcome.error = fault(fault_kind(error), error)
            return outcome, None
        finally:
            outcome.generation_s = time.perf_counter() - started
        describe(state, outcome)
        if (problem := state.get("error")) is not None:
            outcome.error = problem_of(problem)
            await self._env.rubric.cleanup(state)
        elif state.get("stop_condition") == "timeout_reached":
            # A limit on wall-clock time counts the server's delays too, so what it cuts off is no wrong answer.
            outcome.error = fault("timeout", "the environment's own timeout_seconds was reached", "TimeoutError")
            await self._env.rubric.cleanup(state)
        elif has_own_scoring(self._env):
            outcome.reward, outcome.metrics = state.get("reward"), dict(state.get("metrics") or {})
        return outcome, None if outcome.error else state

    async def _score(self, states: list[Any], outcomes: list[Outcome]) -> None:
        if has_own_scoring(self._env):
            return
        started = time.perf_counter()
        rubric = self._env.rubric
        error: BaseException | None = None
        try:
            await (rubric.score_group(states) if self.grouped else rubric.score_rollout(states[0]))
        except Exception as caught:
            logger.exception("scoring %s", CURRENT.get())
            error = caught
        for state, outcome in zip(states, outcomes, strict=True):
            outcome.scoring_s = time.perf_counter() - started
            await rubric.cleanup(state)
            self._take_scores(state, outcome, error)

    def _take_scores(self, state: Any, outcome: Outcome, error: BaseException | None) -> None:
        """The reward, unless a reward function raised: verifiers logs that and counts 0."""
        if error is not None:
            outcome.error = fault("scoring", error)
            return
        outcome.reward, metrics = state.get("reward"), dict(state.get("metrics") or {})
        outcome.extracted = None if state.get("extracted") is None else str(state["extracted"])
        outcome.info = dict(state.get(ROW_INFO) or {})
        unanswered = bool(state.get("prompt_too_long")) and not outcome.completion
        for failure in failed_functions(state):
            metrics[failure.name] = 0.0 if unanswered else None
            # With no answer at all, because the prompt did not fit, 0 is the score and the function's error its echo.
            if failure.weight and not unanswered:
                outcome.error = fault("scoring", failure.error)
        outcome.metrics = metrics

    def _sampling(self, rollout: int) -> dict[str, Any]:
        """Ours over the environment's own."""
        merged = copy.deepcopy(self._env.sampling_args or {})
        ours = self._job.sampling_for(rollout)
        extra = {**(merged.pop("extra_body", None) or {}), **ours.pop("extra_body", {})}
        if "max_tokens" in extra:
            merged.pop("max_tokens", None)
            merged.pop("max_completion_tokens", None)
        return {**merged, **ours, "extra_body": extra}


def has_own_scoring(env: Any) -> bool:
    """Whether the environment scores inside its rollout (a taskset that verifiers 0.1 wraps)."""
    return type(env)._run_rollout_state is not vf.Environment._run_rollout_state


def scores_groups(env: Any) -> bool:
    """Whether any reward function wants all rollouts of an example; verifiers forgets to ask an EnvGroup's members."""
    return bool(env.requires_group_rollouts) or any(scores_groups(member) for member in getattr(env, "envs", []))


def example_of(line: dict[str, Any]) -> Example:
    info = line.get("info")
    info = json.loads(info) if isinstance(info, str) and info else info or {}
    task = line.get("task")
    if not isinstance(task, str) and isinstance(info, dict) and isinstance(info.get("env_id"), str):
        task = info["env_id"]
    return Example(
        example_id=line["example_id"],
        prompt=line.get("prompt"),
        answer=line.get("answer", ""),
        info=info,
        task=task if isinstance(task, str) else "default",
    )


def numbered(examples: list[Example], env_id: str) -> list[Example]:
    """The examples with an `example_id` of 0 to n-1 each: their own where those are just that, else their positions.

    A data set that counts from 1, or one that was filtered, has others. Raises `SetupError` when two are equal.
    """
    ids = {example.example_id for example in examples}
    if len(ids) != len(examples):
        raise SetupError(
            f"environment {env_id!r} gives {len(examples)} examples but only {len(ids)} different example_id; make them "
            "unique or drop that column"
        )
    if ids == set(range(len(examples))):
        return examples
    return [replace(example, example_id=position) for position, example in enumerate(examples)]


def describe(state: Any, outcome: Outcome) -> None:
    """What the row shows of verifiers' state."""
    outcome.prompt = messages(state.get("prompt"))
    outcome.completion = messages(state.get("completion") or [])
    outcome.num_turns = len(state.get("trajectory") or [])
    outcome.stop_condition = state.get("stop_condition")
    outcome.truncated = bool(state.get("is_truncated") or state.get("prompt_too_long"))


def messages(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [m.model_dump(mode="json", exclude_none=True) if hasattr(m, "model_dump") else m for m in value]


def problem_of(error: Any) -> dict[str, str]:
    """The row's error for what verifiers left in `state["error"]`."""
    return fault(fault_kind(error), error) if isinstance(error, BaseException) else fault("environment", str(error))


def fault_kind(error: BaseException) -> str:
    """`server` when a call to the model is at the root of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (vf.ModelError, openai.OpenAIError, httpx.HTTPError)):
            return "server"
        cause = cause.__cause__
    return "environment"
