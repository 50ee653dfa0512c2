"""New checkpoints on S3, announced as events that start their suites."""

from prefect import flow

from modal_eval.config.watch import WatchRequest
from tasks.watching import announce_checkpoints, refuse_without_bucket


@flow(name="watch")
def watch(request: WatchRequest) -> dict[str, int]:
    """Look for checkpoints that are new and whole, and send a `checkpoint.created` event for each.

    Each content at an address is announced once, whatever restarts, duplicates and re-uploads there are. Returns how many
    were announced, known, waited for, too old, or no checkpoint. A deployment whose block nobody has saved yet says so once,
    and its schedule rests until it is deployed again.
    """
    refuse_without_bucket(request)
    return announce_checkpoints(request)
