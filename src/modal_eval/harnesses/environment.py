"""Which Python runs a harness: one that the team has, or one that is made from a locked file and cached."""

from __future__ import annotations

from pathlib import Path

from modal_eval.config.models import RunConfig
from modal_eval.environments import ensure_environment, named_environment
from modal_eval.errors import ConfigError

LOCKED = {"legacy": "verifiers-legacy", "v1": "verifiers-v1"}
"""The locked file of `requirements/` for each of verifiers' interfaces."""
HARNESSES = {"evalplus": "evalplus", "lm_eval": "lm-eval", "olmes": "olmes"}
"""The locked file of the other harnesses that we can install."""


def environment_for(config: RunConfig) -> Path:
    """The Python of the harness's environment, made on first use.

    `eval.environment` names one that exists. Otherwise `eval.harness_api` chooses; `auto` takes `legacy`, which all our
    own environments speak. Raises `ConfigError` and `EngineEnvError`.
    """
    if config.eval.environment:
        if config.eval.packages:
            raise ConfigError(
                f"eval.packages={config.eval.packages} cannot be added to eval.environment="
                f"{config.eval.environment}, which is yours; install them there and drop eval.packages"
            )
        return named_environment(config.eval.environment)
    if config.eval.harness == "olmes" and not config.eval.packages:
        raise ConfigError(
            "OLMES comes with no environment of ours: clone allenai/olmes, install it in a virtual environment of its own, and "
            "name that with --eval.environment=/opt/olmes-venv/bin/python; or name its package with --eval.packages, such as "
            "'ai2-olmes @ git+URL@COMMIT', and an environment is made"
        )
    if name := HARNESSES.get(config.eval.harness):
        return ensure_environment(name, packages=config.eval.packages)
    api = "legacy" if config.eval.harness_api == "auto" else config.eval.harness_api
    return ensure_environment(LOCKED[api], packages=config.eval.packages)
