"""Prepare, as Prefect sees it."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy

from modal_eval import paths
from modal_eval.stages import generating, preparing
from tasks.naming import key_of_inputs
from tasks.retrying import is_retryable


def preparing_owed(run_dir: Path) -> bool:
    """Whether a cached result would not do: nothing was found yet, or it was found on another node and a server is needed."""
    if not (run_dir / paths.PREPARED).is_file():
        return True
    return bool(generating.owed_rollouts(run_dir)) and not preparing.model_is_here(run_dir)


@task(
    name="prepare",
    retries=2,
    retry_delay_seconds=[2, 10],
    retry_condition_fn=is_retryable,
    cache_policy=CacheKeyFnPolicy(cache_key_fn=key_of_inputs),
    persist_result=True,
    result_serializer="json",
)
def prepare(run_dir: Path) -> dict[str, Any]:
    return preparing.prepare(run_dir)
