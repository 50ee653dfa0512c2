"""Generate, as Prefect sees it: cached once everything is generated, tried again when the harness dies."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy

from modal_eval.proxy import Proxy
from modal_eval.results.run_folder import Run
from modal_eval.stages import generating, scoring
from tasks.artifacts import key_of, progress_shown
from tasks.naming import key_of_identity
from tasks.retrying import is_retryable


def generation_owed(run_dir: Path) -> bool:
    """Whether any rollout is still without a score; then a server is needed."""
    return bool(generating.owed_rollouts(run_dir))


@task(name="replay", retries=0, cache_policy=NO_CACHE, persist_result=False)
def replay(run_dir: Path) -> int:
    """Finish from the journal what it answers to the end; then no server is deployed for it."""
    return scoring.finish_without_server(run_dir)


@task(
    name="generate",
    retries=2,
    retry_delay_seconds=[1, 10],
    retry_condition_fn=is_retryable,
    cache_policy=CacheKeyFnPolicy(cache_key_fn=key_of_identity),
    persist_result=True,
    result_serializer="json",
)
def generate(run_dir: Path, proxy: Proxy | None) -> dict[str, int]:
    config = Run.load(run_dir).config
    with progress_shown(run_dir, key_of("progress", config.name), f"rollouts of {config.name} by {config.model}"):
        return generating.generate(run_dir, proxy)
