"""Push to the Hub, as Prefect sees it: retried, and never the reason why an evaluation fails."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from modal_eval.results.run_folder import Run
from modal_eval.stages import publishing
from tasks.artifacts import key_of, publish_link
from tasks.retrying import is_retryable


@task(
    name="push_to_hub",
    retries=1,  # the library tries for more than a minute by itself
    retry_delay_seconds=10,
    retry_condition_fn=is_retryable,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def push_to_hub(run_dir: Path, repo: str) -> str:
    url = publishing.push(run_dir, repo)
    publish_link(key_of("hub", Run.load(run_dir).config.name), url, repo, "the run on the Hugging Face Hub")
    return url
