"""Prepare, as Prefect sees it."""

from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy

from modal_eval.stages import preparing
from tasks.naming import key_of_inputs
from tasks.retrying import is_retryable


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
