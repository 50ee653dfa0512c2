"""verifiers with tasksets (`verifiers.v1`, 0.4): the package's own machinery, and a cheap way for plain questions.

Its runtimes start a process for every rollout. A task that is one question and one answer, scored by functions that
need no runtime, is asked here directly; its trace is built from the package's own classes and scored by its own task.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from verifiers.v1.clients import ModelContext
from verifiers.v1.clients.eval import EvalClient
from verifiers.v1.configs.agent import resolve_agent
from verifiers.v1.configs.client import EvalClientConfig
from verifiers.v1.dialects import ChatDialect
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.env import Env
from verifiers.v1.episode import Episode
from verifiers.v1.errors import ProviderError
from verifiers.v1.graph import prepare_turn
from verifiers.v1.interception import server as interception_server
from verifiers.v1.state import state_cls
from verifiers.v1.task import Task, TaskData
from verifiers.v1.trace import AgentInfo, Error, ModelCall, TimeSpan, Trace, TraceTask
from verifiers.v1.types import Response, SamplingConfig, SystemMessage, UserMessage

from modal_eval.harnesses.adapters.common import (
    OVERLONG_PHRASES,
    ROLLOUT_HEADER,
    CallLog,
    Example,
    Job,
    Outcome,
    SetupError,
    digest_of_module,
    fault,
    package_version,
)
from modal_eval.harnesses.adapters.v1_environment import asks_directly, load_env

logger = logging.getLogger("modal_eval.harness")

TAGS: dict[str, str] = {}
"""Trace id → rollout, for the header; an entry lives as long as its rollout."""

CHAT = ChatDialect()


class TaggingClient(EvalClient):
    """verifiers' client, which says in a header which rollout a call belongs to."""

    def _headers(self, dialect: Any, incoming: Any, session_id: str | None) -> Any:
        headers = super()._headers(dialect, incoming, session_id)
        if session_id is not None and (tag := TAGS.get(session_id)) is not None:
            headers[ROLLOUT_HEADER] = tag
        return headers


# One client serves all rollouts of an endpoint, and only the trace's id tells them apart in there.
interception_server.resolve_client = TaggingClient


class V1Backend:
    """A taskset, played by the package's environment or asked directly."""

    harness = "verifiers"
    api = "v1"
    grouped = False
    asks_ahead = False

    def __init__(self, job: Job, version: str) -> None:
        self.version = version
        self._job = job
        self._env: Env = load_env(job)
        taskset = self._env.taskset
        if not taskset.bounded and job.num_examples is None:
            raise SetupError(f"taskset {job.env_id!r} has no end; set eval.num_examples")
        self._tasks: list[Task] = list(taskset if taskset.bounded else taskset.take(job.num_examples))
        self.examples = [example_of(position, task) for position, task in enumerate(self._tasks)]
        self._direct = asks_directly(self._env, self._tasks, job)
        self.environment_version = package_version(job.module_name)
        self.environment_sha256 = digest_of_module(job.module_name)
        self.data: dict[str, Any] = {}
        # The variable is not set, so that the key of another service never travels to the proxy.
        self._client_config = EvalClientConfig(base_url=job.base_url, api_key_var="MODAL_EVAL_NO_KEY")
        logger.info("rollouts are %s", "asked directly" if self._direct else "played in verifiers' runtime")

    async def open(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._client = TaggingClient(self._client_config)
        self._stack.push_async_callback(self._client.close)
        if not self._direct:
            await self._stack.enter_async_context(self._env.serving())

    async def close(self) -> None:
        await self._stack.aclose()

    async def run_one(self, position: int, rollout: int, calls: CallLog) -> Outcome:
        given = self._job.sampling_for(rollout)
        context = ModelContext(
            model=self._job.model, client=self._client_config, sampling=SamplingConfig.model_validate(given)
        )
        tag = f"{self.examples[position].example_id}/{rollout}"
        traces: list[Trace] = []

        def minted(trace: Trace) -> None:
            TAGS[trace.id] = tag
            traces.append(trace)

        try:
            if self._direct:
                outcome = outcome_of(await self._ask(self._tasks[position], context, minted))
            else:
                slot = self._env.slots(self._tasks[position])[0]
                outcome = outcome_of_episode(await self._env.run_slot(slot, context, on_trace=minted))
        finally:
            for trace in traces:
                TAGS.pop(trace.id, None)
                count_calls(trace, calls)
        outcome.calls = calls
        return outcome

    async def run_group(self, position: int, rollouts: Sequence[int], calls: Sequence[CallLog]) -> list[Outcome]:
        raise NotImplementedError("tasksets score each rollout by itself")

    async def _ask(self, task: Task, context: ModelContext, minted: Any) -> Trace:
        """One question, one answer, scored: what the package does, without its process."""
        spec = resolve_agent(
            self._env.config.agent,
            model=context.model,
            client=context.client,
            sampling=context.sampling,
            harness=self._env._default_harness,
        )
        trace = Trace(
            task=TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=state_cls(type(task))(),
            agent=AgentInfo(config=spec),
        )
        minted(trace)
        turn = prepare_turn(trace, opening(task.data))
        trace.timing.agent.start = time.time()
        try:
            response = await self._call(turn.prompt, context, trace)
        except ProviderError as error:
            turn.commit_prompt()
            trace.timing.agent.end = time.time()
            if not is_overlong(error.status_code, str(error)):
                trace.record_error(error)
                return trace
            trace.stop("context_length")
        else:
            trace.calls[-1].node = turn.commit(response)
            trace.timing.agent.end = time.time()
            trace.stop("agent_completed")
        trace.timing.scoring.start = time.time()
        try:
            await task.score(trace)
            trace.ok = True
        except Exception as error:
            logger.exception("scoring %s", TAGS.get(trace.id))
            trace.record_error(error)
        trace.timing.scoring.end = time.time()
        return trace

    async def _call(self, messages: list[Any], context: ModelContext, trace: Trace) -> Response:
        body = {"messages": [message_to_wire(message) for message in messages]}
        body = CHAT.apply_overrides(body, context.model, context.sampling)
        call = ModelCall(model=context.model, sampling=context.sampling, endpoint=CHAT.upstream_path)
        trace.calls.append(call)
        started = time.time()
        try:
            response: Response = await self._client.get_response(CHAT, body, context.sampling, session_id=trace.id)
            call.finish_reason, call.usage = response.finish_reason, response.usage
        except ProviderError as error:
            call.error = Error(type=type(error).__name__, message=str(error), status_code=error.status_code)
            raise
        finally:
            call.time = TimeSpan(start=started, end=time.time())
        return response


def opening(data: TaskData) -> list[Any]:
    """The conversation up to the model's turn."""
    prompt = [UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt or [])
    return [SystemMessage(content=data.system_prompt), *prompt] if data.system_prompt else prompt


def example_of(position: int, task: Task) -> Example:
    own = set(type(task.data).model_fields) - set(TaskData.model_fields)
    fields = task.data.model_dump(mode="json", include={*own, "id", "name"}, exclude_none=True)
    answer = fields.pop("answer", "")
    prompt = [message_to_wire(message) for message in opening(task.data)]
    return Example(example_id=position, prompt=prompt, answer=answer, info=fields)


def count_calls(trace: Trace, log: CallLog) -> None:
    for call in trace.calls:
        if call.error is None:
            log.record(call.finish_reason, call.usage)


def outcome_of(trace: Trace) -> Outcome:
    """The row of a trace; any doubt whether it was scored makes it unscored."""
    path = trace.branches[-1].nodes if trace.branches else []
    first = next((index for index, node in enumerate(path) if node.sampled), len(path))
    outcome = Outcome(
        completion=[message_to_wire(node.message) for node in path[first:]],
        generation_s=trace.timing.agent.duration,
        scoring_s=trace.timing.scoring.duration,
        num_turns=trace.num_turns,
        stop_condition=trace.stop_condition,
        truncated=trace.is_truncated or any(overlong(call) for call in trace.calls),
        metrics={**{name: reward and reward.score for name, reward in trace.rewards.items()}, **trace.metrics},
    )
    outcome.error = error_of(trace)
    if outcome.error is None:
        outcome.reward = trace.reward
    return outcome


def error_of(trace: Trace) -> dict[str, str] | None:
    if trace.is_timeout:
        return fault("timeout", f"verifiers ended the rollout: {trace.stop_condition}", "TimeoutError")
    last = trace.calls[-1].error if trace.calls else None
    if last is not None and not overlong(trace.calls[-1]):
        # A harness that swallows a failed call and ends quietly would have the server's fault scored as an answer.
        return fault("server", last.message, last.type)
    if (error := trace.last_error) is not None:
        at_scoring = bool(trace.timing.scoring.start) and error.type == "TaskError"
        kind = "server" if error.type == "ProviderError" else "scoring" if at_scoring else "environment"
        return fault(kind, error.message, error.type)
    if missing := [name for name, reward in trace.rewards.items() if reward is None]:
        return fault("scoring", f"not computed: {', '.join(missing)}", "MissingReward")
    return None if trace.rewards else fault("scoring", "the task has no reward", "MissingReward")


def outcome_of_episode(episode: Episode) -> Outcome:
    """One agent's trace, or the mean over those that are trained where several play."""
    if not episode.traces:
        error = episode.last_error
        return Outcome(error=fault("environment", error.message if error else "no agent ran", error and error.type))
    played = [trace for trace in episode.traces if trace.agent.trainable] or episode.traces
    outcomes = [outcome_of(trace) for trace in played]
    outcome = outcomes[0]
    if len(outcomes) > 1:
        outcome.metrics = named_by_agent(played, outcomes)
        rewards = [each.reward for each in outcomes if each.reward is not None]
        outcome.reward = sum(rewards) / len(rewards) if rewards else None
    outcome.error = next((each.error for each in outcomes if each.error), None)
    if outcome.error is None and (error := episode.last_error) is not None and not episode.ok:
        outcome.error = fault("environment", error.message, error.type)
    return outcome


def named_by_agent(traces: Sequence[Trace], outcomes: Sequence[Outcome]) -> Mapping[str, float | None]:
    return {
        f"{trace.agent.name}_{index}_{name}": value
        for index, (trace, outcome) in enumerate(zip(traces, outcomes, strict=True))
        for name, value in outcome.metrics.items()
    }


def is_overlong(status: int | None, text: str) -> bool:
    return status == 400 and any(phrase in text.lower() for phrase in OVERLONG_PHRASES)


def overlong(call: ModelCall) -> bool:
    return call.error is not None and is_overlong(call.error.status_code, call.error.message)
