"""`modal-eval watch`: look for new checkpoints now, for ever, or when somebody says so."""

from __future__ import annotations

import logging
import os
from typing import Annotated, Any

from cyclopts import App, Parameter
from pydantic import ValidationError

from modal_eval.cli.evaluating import require_prefect
from modal_eval.cli.init import from_checkout
from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json, talk
from modal_eval.config.load import explain
from modal_eval.config.watch import WatchRequest
from modal_eval.errors import EXIT_DONE, ConfigError

SHORTEST_TOKEN = 16

AddressArgument = Annotated[str | None, Parameter(help="s3://BUCKET/PREFIX: checkpoints at any depth below it.")]
Bucket = Annotated[
    str | None, Parameter(name="--bucket", help="Name of a Checkpoint Bucket block, in place of the address.")
]
QueueUrl = Annotated[
    str | None,
    Parameter(name="--queue", help="URL of an SQS queue of the bucket's notifications; without one it is listed."),
]
MemoryOption = Annotated[
    str | None, Parameter(name="--memory", help="Folder or s3:// address that holds what was announced.")
]
Settle = Annotated[float, Parameter(name="--settle", help="Look at a checkpoint once its newest file is so old, in s.")]
MaxAge = Annotated[
    float, Parameter(name="--max-age", help="Do not announce one whose newest file is older, in s; 0 for no limit.")
]
Interval = Annotated[float, Parameter(name="--interval", help="Seconds from one look to the next.")]

command = App(
    name="watch",
    help="Announce new checkpoints on S3 to Prefect, each content once: events that start their suites.",
)


@command.command
def once(
    address: AddressArgument = None,
    /,
    *,
    bucket: Bucket = None,
    queue: QueueUrl = None,
    memory: MemoryOption = None,
    settle: Settle = 60,
    max_age: MaxAge = 172800,
    json: Json = False,
) -> int:
    """Look once and say what was found."""
    request = asked(address, bucket=bucket, queue_url=queue, memory=memory, settle=settle, max_age=max_age, duration=0)
    return show(run_flow(request), as_json=json)


@command.command
def loop(
    address: AddressArgument = None,
    /,
    *,
    bucket: Bucket = None,
    queue: QueueUrl = None,
    memory: MemoryOption = None,
    settle: Settle = 60,
    max_age: MaxAge = 172800,
    interval: Interval = 30,
    duration: Annotated[
        float | None, Parameter(name="--duration", help="End after so many seconds; else on Ctrl-C.")
    ] = None,
    json: Json = False,
) -> int:
    """Look again and again. May be killed at any moment."""
    request = asked(
        address, bucket=bucket, queue_url=queue, memory=memory, settle=settle, max_age=max_age, duration=duration,
        interval=interval,
    )  # fmt: skip
    return show(run_flow(request), as_json=json)


@command.command
def serve(
    address: AddressArgument = None,
    /,
    *,
    bucket: Bucket = None,
    memory: MemoryOption = None,
    settle: Settle = 0,
    max_age: MaxAge = 172800,
    interval: Interval = 30,
    host: Annotated[str, Parameter(name="--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(name="--port", help="Port to listen on; 0 takes a free one.")] = 8765,
    token_env: Annotated[
        str, Parameter(name="--token-env", help="Variable with the token that callers have to send.")
    ] = "MODAL_EVAL_WATCH_TOKEN",  # noqa: S107 - a variable's name
) -> int:
    """Take word of a checkpoint over HTTP: POST /checkpoints with `{"bucket": …, "prefix": …}` and a bearer token.

    What is whole is announced at once, the rest is looked at again until it is. The same checkpoint may be told of as
    often as one likes.
    """
    token = os.environ.get(token_env, "")
    if len(token) < SHORTEST_TOKEN:
        raise ConfigError(
            f"{token_env} holds {len(token)} characters and {SHORTEST_TOKEN} are the least; set it to a long random token, "
            "such as `openssl rand -hex 32` makes"
        )
    request = asked(address, bucket=bucket, memory=memory, settle=settle, max_age=max_age, interval=interval)
    require_prefect("an event")
    watcher = from_checkout("tasks.watching").watcher_for(request)
    from modal_eval.cli import watch_server

    log_to_terminal()
    watch_server.serve(watcher, token, host=host, port=port, interval_s=request.interval)
    return EXIT_DONE


def asked(address: str | None, *, max_age: float, **settings: Any) -> WatchRequest:
    """The request; what is wrong with it is said in one line."""
    try:
        return WatchRequest(address=address, max_age=max_age or None, **settings)
    except ValidationError as error:
        raise ConfigError(explain(error, WatchRequest)) from error


def run_flow(request: WatchRequest) -> dict[str, int]:
    require_prefect("an event")
    log_to_terminal()
    counts: dict[str, int] = from_checkout("flows.watch").watch(request)
    return counts


def log_to_terminal() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s | %(message)s"))
    logger = logging.getLogger("modal_eval")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def show(counts: dict[str, int], *, as_json: bool) -> int:
    if as_json:
        print_json(counts)
        return EXIT_DONE
    if not counts:
        talk.print("No checkpoint is there.")
    for kind, count in sorted(counts.items()):
        data.print(f"{count:>6} {kind}")
    return EXIT_DONE
