"""The command line of our llama.cpp server script."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from modal_eval.config.models import RunConfig
from modal_eval.environments import ensure_environment, named_environment
from modal_eval.errors import ConfigError
from modal_eval.records import PreparedModel

SCRIPT = Path(__file__).with_name("llamacpp_server.py")
CONTEXT = 2048
MAX_SLOTS = 8
THREADS = 1  # on a busy machine two threads fall to a tenth of the speed of one
WITHHELD = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
EXTRA = frozenset({"slots", "threads"})


def environment(config: RunConfig, *, say: Callable[[str], None]) -> Path:
    """The Python of the environment that has xllamacpp."""
    if config.infra.environment:
        return named_environment(config.infra.environment)
    return ensure_environment("llamacpp", say=say)


def command(python: Path, config: RunConfig, model: PreparedModel, port: int) -> list[str]:
    """One slot per concurrent rollout, up to a number that keeps the context affordable.

    Raises `ConfigError` for an extra argument that this server does not have: it would be left out in silence.
    """
    extra = config.vllm.extra_args
    if unknown := sorted(set(extra) - EXTRA):
        raise ConfigError(f"vllm.extra_args.{unknown[0]} is vLLM's; llama.cpp takes {', '.join(sorted(EXTRA))} here")
    words = [str(python), str(SCRIPT), "--model", str(model.path), "--port", str(port), "--alias", model.served_name]
    words += ["--slots", str(extra.get("slots", min(config.eval.max_concurrent, MAX_SLOTS)))]
    words += ["--threads", str(extra.get("threads", THREADS))]
    words += ["--context", str(config.vllm.max_model_len or CONTEXT), "--seed", str(config.vllm.seed)]
    if not config.vllm.prefix_caching:
        words += ["--no-prefix-caching"]
    if model.chat_template:
        words += ["--chat-template-file", str(model.chat_template)]
    return words


def variables(python: Path, config: RunConfig, number: int) -> dict[str, str]:
    """The server's environment: ours, without what it has no use for."""
    return {name: value for name, value in os.environ.items() if name not in WITHHELD}
