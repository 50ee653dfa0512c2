"""Servers on a node: each replica has GPUs of its own, leased until its process has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from modal_eval import gpus
from modal_eval.config.models import RunConfig
from modal_eval.gpus import GpuLease
from modal_eval.records import PreparedModel


def lease_gpus(
    config: RunConfig, model: PreparedModel, run: str, *, say: Callable[[str], None]
) -> list[GpuLease | None]:
    """One lease a replica. Waits until there are GPUs for one replica, and takes as many of those asked for as are free.

    `run` is what others are told of the holder. `None` stands for a replica without a lease: everywhere but on a node, and
    for llama.cpp on a node without any GPU. Raises `GpuError` when no wait would help, or after `infra.gpu_wait` seconds.
    """
    if config.infra.target != "node":
        return [None] * config.vllm.replicas
    there = gpus.inventory()
    if not there and config.infra.engine == "llamacpp":
        return [None] * config.vllm.replicas
    each = config.vllm.tensor_parallel_size
    wanted = len(there) if config.vllm.data_parallel_size == "auto" else config.vllm.replicas * each
    lease = gpus.take(
        each,
        run=run,
        what=f"{config.infra.engine} {model.model_id}",
        up_to=wanted,
        timeout=config.infra.gpu_wait,
        on_wait=say,
    )
    say(f"leased GPU {', '.join(map(str, lease.indices))}")
    return list(lease.split(each))


def gpus_of(config: RunConfig, lease: GpuLease | None) -> int:
    """How many GPUs one replica has: those of its lease, else those that vLLM is told to use."""
    if lease:
        return len(lease.indices)
    return config.vllm.tensor_parallel_size if config.infra.engine == "vllm" else 0


def release(leases: Sequence[GpuLease | None]) -> None:
    """Give back what no server has taken over."""
    for lease in leases:
        if lease:
            lease.release()
