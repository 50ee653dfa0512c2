"""Deploy, proxy and teardown, as Prefect sees them: never cached, because a server is not a value."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from modal_eval.proxy import Proxy
from modal_eval.records import ServerHandle
from modal_eval.results.run_folder import Run
from modal_eval.stages import serving
from tasks.artifacts import key_of, publish_link
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
    server = serving.deploy(run_dir)
    show_link(run_dir, server)
    return server


def show_link(run_dir: Path, server: ServerHandle) -> None:
    """The server, as a link that stands in the UI while the run goes on and after it."""
    benchmark = Run.load(run_dir).config.name
    name = server.app or f"{server.engine} with {server.model}"
    for url in server.base_urls[:1]:
        publish_link(key_of("server", benchmark), url, name, f"lease {server.lease_id}" if server.lease_id else "")


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
