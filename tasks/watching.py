"""Watch, as Prefect sees it: one task that looks for as long as it was asked to."""

import math
from typing import Any

from prefect import get_client, runtime, task
from prefect.cache_policies import NO_CACHE

from blocks.buckets import CheckpointBucket
from modal_eval import paths
from modal_eval.checkpoints.s3_objects import Access, Address, client_for
from modal_eval.checkpoints.watching import Memory, Watcher
from modal_eval.checkpoints.watching.sources import Queue
from modal_eval.config.watch import WatchRequest
from modal_eval.errors import ConfigError
from tasks.accounts import named
from tasks.events import announce_checkpoint
from tasks.retrying import is_retryable


@task(
    name="announce_checkpoints",
    retries=3,
    retry_delay_seconds=[5, 30, 60],
    retry_condition_fn=is_retryable,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def announce_checkpoints(request: WatchRequest) -> dict[str, int]:
    watcher = watcher_for(request)
    watcher.run(math.inf if request.duration is None else request.duration, request.interval)
    return dict(watcher.counts)


def refuse_without_bucket(request: WatchRequest) -> None:
    """Raise `ConfigError` when there is no block of the name that `request` gives.

    Said every minute it would be overlooked, so the schedules that brought this run are put to rest first.
    """
    if not request.bucket:
        return
    try:
        named(CheckpointBucket, request.bucket)
    except ConfigError as error:
        rest = put_schedules_to_rest()
        again = "; its schedule rests until `prefect --no-prompt deploy -n watch/checkpoints`" if rest else ""
        raise ConfigError(f"{error}{again}") from error


def put_schedules_to_rest() -> int:
    """Deactivate the schedules of the deployment that this flow run is of; how many there were."""
    if not runtime.deployment.id:
        return 0
    with get_client(sync_client=True) as client:
        active = [one for one in client.read_deployment_schedules(runtime.deployment.id) if one.active]
        for one in active:
            client.update_deployment_schedule(runtime.deployment.id, one.id, active=False)
    return len(active)


def watcher_for(request: WatchRequest) -> Watcher:
    """The watcher that `request` describes; secrets of its block stay in this process."""
    told: dict[str, Any] = {"address": request.address, "queue_url": request.queue_url, "memory": request.memory}
    access = Access()
    if request.bucket:
        block = named(CheckpointBucket, request.bucket)
        told = {name: value or getattr(block, name) for name, value in told.items()}
        access = block.access()
    where = Address.of(told["address"])
    client = client_for(where, access)
    return Watcher(
        client,
        where,
        Memory.at(told["memory"] or str(paths.state_dir() / "watch"), client),
        announce_checkpoint,
        Queue(told["queue_url"], access) if told["queue_url"] else None,
        request.settle,
        math.inf if request.max_age is None else request.max_age,
    )
