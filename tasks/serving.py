"""Deploy, proxy and teardown, as Prefect sees them: never cached, because a server is not a value."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from modal_eval.proxy import Proxy
from modal_eval.records import ServerHandle
from modal_eval.stages import serving
from tasks.retrying import is_retryable


@task(
    name="deploy_server",
    retries=1,
    retry_delay_seconds=5,
    retry_condition_fn=is_retryable,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def deploy_server(run_dir: Path) -> ServerHandle:
    return serving.deploy(run_dir)


@task(
    name="start_proxy",
    retries=1,
    retry_delay_seconds=1,
    retry_condition_fn=is_retryable,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def start_proxy(run_dir: Path, server: ServerHandle | None) -> Proxy:
    return serving.start_proxy(run_dir, server)


@task(name="teardown", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE, persist_result=False)
def teardown(run_dir: Path) -> None:
    serving.teardown(run_dir)
