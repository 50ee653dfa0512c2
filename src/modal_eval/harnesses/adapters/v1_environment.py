"""Build a taskset's environment from our `env_args`, and see whether it can do without a runtime."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from verifiers.v1.configs.agent import AgentConfig
from verifiers.v1.configs.env import EnvConfig
from verifiers.v1.env import Env
from verifiers.v1.envs.single_agent import SingleAgentEnv
from verifiers.v1.task import Task
from verifiers.v1.utils.decorators import discover_decorated
from verifiers.v1.utils.generic import concrete_type
from verifiers.v1.utils.loaders import default_harness_id, environment_class, load_environment

from modal_eval.harnesses.adapters.common import Job

ENV_KEY = "env"
"""`env_args.env` configures the environment around the taskset (its agents, harness, runtime); all other keys of
`env_args` are the taskset's own."""


def load_env(job: Job) -> Env:
    """The environment that verifiers would make, with a chat loop on this machine where it would rent a box.

    verifiers' defaults are an agent with a shell in Prime's cloud. A harness that the taskset brings, or that
    `env_args.env` names, stays.
    """
    settings = dict(job.env_args)
    around: dict[str, Any] = dict(settings.pop(ENV_KEY, None) or {})
    taskset_id = job.env_id
    env_class = environment_class(taskset_id, around.get("id", ""))
    config_class = concrete_type(env_class, EnvConfig, origin=Env) or EnvConfig
    brings_harness = default_harness_id(taskset_id) != "bash"
    for name, field in config_class.model_fields.items():
        if not isinstance(field.default, AgentConfig):
            continue
        agent = dict(around.get(name) or {})
        if "runtime" not in field.default.model_fields_set:
            agent.setdefault("runtime", {"type": "subprocess"})
        if field.default.harness is None and not brings_harness:
            agent.setdefault("harness", {"id": "null"})
        around[name] = agent
    config = config_class.model_validate({**around, "taskset": {"id": taskset_id, **settings}})
    return load_environment(config)


def asks_directly(env: Env, tasks: Sequence[Task], job: Job) -> bool:
    """Whether every task is one question and one answer that nothing but its own functions looks at."""
    if type(env) is not SingleAgentEnv or job.env_args.get(ENV_KEY):
        return False
    if default_harness_id(job.env_id) != "bash" or env.taskset.toolsets(env.taskset.config):
        return False
    return all(is_plain(task) for task in tasks)


def is_plain(task: Task) -> bool:
    """No hook, tool, box or runtime: only a prompt and functions over the trace."""
    kind, data = type(task), task.data
    if kind.setup is not Task.setup or kind.finalize is not Task.finalize or kind.score is not Task.score:
        return False
    if kind.toolsets(task.config) or discover_decorated(task, "intercept") or task.hooks("stop"):
        return False
    if data.prompt is None or data.image or data.workdir or data.agent_user or data.skills or data.artifacts:
        return False
    scorers = [*task.hooks("metric"), *task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    return not any(wants_runtime(function) for function in scorers)


def wants_runtime(function: Any) -> bool:
    return "runtime" in inspect.signature(function).parameters
