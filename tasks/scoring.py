"""Score, as Prefect sees it: repeated freely, because it reads the journal and holds no server."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from modal_eval.stages import scoring
from tasks.retrying import is_retryable


@task(name="score", retries=1, retry_delay_seconds=1, retry_condition_fn=is_retryable, cache_policy=NO_CACHE)
def score(run_dir: Path) -> int:
    return scoring.score(run_dir)
