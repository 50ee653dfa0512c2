"""`infra.target=auto`: GPUs of this machine while some come free in time, Modal otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from modal_eval import gpus
from modal_eval.config.models import RunConfig
from modal_eval.errors import GpuError
from modal_eval.records import PreparedModel
from modal_eval.serving import modal_calls

WAIT_S = 600.0
"""So long `auto` waits for GPUs of this machine where `infra.gpu_wait` says nothing."""

Started = TypeVar("Started")


def why_not_here(config: RunConfig) -> str:
    """Why no GPUs of this machine could ever serve `config`; empty when only time is needed."""
    try:
        gpus.usable(config.vllm.tensor_parallel_size)
    except GpuError as error:
        return str(error)
    return ""


def overflow_after(config: RunConfig) -> float | None:
    """Seconds after which a run that waits for a node goes to Modal; `None` for a run that has one place only."""
    if config.infra.target != "auto":
        return None
    return WAIT_S if config.infra.gpu_wait is None else config.infra.gpu_wait


def placed(config: RunConfig) -> RunConfig:
    """`config` with `auto` resolved as far as it can be known before anybody asks for a GPU; any other as it is."""
    if config.infra.target != "auto":
        return config
    return config.on("modal" if why_not_here(config) else "node")


def start_in_turn(
    config: RunConfig,
    model: PreparedModel,
    start: Callable[[RunConfig, PreparedModel], Started],
    *,
    say: Callable[[str], None],
) -> Started:
    """Call `start` with the place that `config` names; for `auto` here first, and on Modal if that brought no GPU.

    Without an account on Modal, `auto` waits here for as long as `infra.gpu_wait` says. A server that gets its GPUs and
    then fails has failed: it would fail on Modal, too.
    """
    if config.infra.target != "auto":
        return start(config, model)
    if not (reason := why_not_here(config)) and model.source == "hub" and model.path is None:
        reason = f"{model.model_id} was prepared where there are no GPUs for it, so its weights are not here"
    if not reason:
        try:
            return start(with_patience(config), model)
        except GpuError as error:
            if not modal_calls.configured():
                raise
            reason = str(error)
    say(f"{reason}\nso it goes to Modal ({config.infra.gpu})")
    return start(config.on("modal"), replace(model, path=None) if model.source == "hub" else model)


def with_patience(config: RunConfig) -> RunConfig:
    """`config` on this machine, with an end to its waiting if it can go elsewhere."""
    here = config.on("node")
    if not modal_calls.configured():
        return here
    return here.model_copy(update={"infra": here.infra.model_copy(update={"gpu_wait": overflow_after(config)})})
