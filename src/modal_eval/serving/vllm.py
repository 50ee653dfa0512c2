"""The command line of `vllm serve`, from the `vllm:` section."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from modal_eval.config.models import RunConfig
from modal_eval.environments import ensure_environment, named_environment
from modal_eval.errors import ConfigError
from modal_eval.records import PreparedModel


def environment(config: RunConfig, *, say: Callable[[str], None]) -> Path:
    """The Python of the environment that has vLLM."""
    return (
        named_environment(config.infra.environment) if config.infra.environment else ensure_environment("vllm", say=say)
    )


def command(python: Path, config: RunConfig, model: PreparedModel, port: int) -> list[str]:
    """`vllm serve` of a folder on this machine, listening on `port` of this machine alone. Raises as `settings` does."""
    words = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model.path), "--host", "127.0.0.1"]
    return [*words, "--port", str(port), *settings(config, model.served_name, model.chat_template)]


def settings(config: RunConfig, served_name: str, chat_template: PurePath | None) -> list[str]:
    """Every setting under vLLM's own flag, for whichever machine the server is on.

    Raises `ConfigError` for an extra argument that is ours to set: given twice, vLLM would take one of them in silence.
    """
    vllm = config.vllm
    extra = {name.replace("-", "_"): value for name, value in vllm.extra_args.items()}
    if ours := sorted(set(extra) & OURS.keys()):
        raise ConfigError(f"vllm.extra_args.{ours[0]}: {OURS[ours[0]]}")
    if twice := sorted(set(extra) & type(vllm).model_fields.keys()):
        raise ConfigError(f"vllm.extra_args.{twice[0]} has a key of its own; write vllm.{twice[0]}")
    words = ["--served-model-name", served_name]
    words += flag("dtype", vllm.dtype)
    words += flag("max_model_len", vllm.max_model_len)
    words += flag("gpu_memory_utilization", vllm.gpu_memory_utilization)
    words += flag("tensor_parallel_size", vllm.tensor_parallel_size)
    words += flag("seed", vllm.seed)
    words += flag("quantization", vllm.quantization)
    words += flag("enable_prefix_caching", vllm.prefix_caching)
    words += flag("trust_remote_code", vllm.trust_remote_code or None)
    words += flag("enforce_eager", vllm.enforce_eager or None)
    if chat_template:
        words += ["--chat-template", str(chat_template)]
    for name, value in extra.items():
        words += flag(name, value)
    return words


OURS = {
    "model": "the model is what -m names",
    "host": "the server listens on this machine alone",
    "port": "the kernel chooses the port; to use a server at a known one, give --infra.base_url",
    "api_key": "a server on this machine alone needs no key, and a command line is no place for one",
    "served_model_name": "the name follows from -m",
    "chat_template": "the template follows from the model, or from the benchmark's chat_template",
    "enable_prefix_caching": "it has a key of its own; write vllm.prefix_caching",
    "data_parallel_rank": "replicas are servers of their own; write vllm.data_parallel_size",
    "config": "vLLM's own configuration file would hide settings from the run's identity",
}


def flag(name: str, value: Any) -> list[str]:
    """`max_model_len=4096` → `--max-model-len 4096`; true is the bare flag, false its `--no-` form, null nothing.

    A list becomes several words, as vLLM reads lists, and a mapping becomes JSON.
    """
    option = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if value is True:
        return [option]
    if value is False:
        return [f"--no-{option.removeprefix('--')}"]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [option, json.dumps(value) if isinstance(value, dict) else str(value)]


def variables(python: Path, config: RunConfig, number: int) -> dict[str, str]:
    """The server's environment: nothing is sent home or fetched, and replica `number` sees its own GPUs only.

    On a node the lease says which those are; what `CUDA_VISIBLE_DEVICES` names there may be fewer than are asked for.
    """
    found = {name: value for name, value in os.environ.items() if name not in WITHHELD}
    found |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    found["PATH"] = os.pathsep.join([str(python.parent), found.get("PATH", os.defpath)])  # kernels are built with ninja
    if not config.vllm.trust_remote_code:  # such code may stand in a repository of its own
        found |= {"HF_HUB_OFFLINE": "1"}
    if config.vllm.replicas > 1 and config.infra.target != "node":
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices(config, number, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return found


WITHHELD = frozenset({"VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
"""With a key in its environment vLLM would refuse our own calls; a model that is on disk needs no token."""


def devices(config: RunConfig, number: int, visible: str | None) -> list[str]:
    """The GPUs of replica `number`: the next `tensor_parallel_size` of those that this process may use.

    Raises `ConfigError` when `CUDA_VISIBLE_DEVICES` names too few.
    """
    each, replicas = config.vllm.tensor_parallel_size, config.vllm.replicas
    usable = [name.strip() for name in visible.split(",")] if visible else [str(one) for one in range(each * replicas)]
    if len(usable) < each * replicas:
        raise ConfigError(
            f"vllm.data_parallel_size={replicas} with tensor_parallel_size={each} needs {each * replicas} GPUs, and "
            f"CUDA_VISIBLE_DEVICES={visible} names {len(usable)}"
        )
    return usable[number * each : (number + 1) * each]
