"""Events that we send to Prefect.

A new checkpoint is this event, whichever way it was noticed:

    event       checkpoint.created
    resource    prefect.resource.id    s3://BUCKET/PREFIX
                prefect.resource.name  last part of the prefix
                modal-eval.run         the training run
                modal-eval.step        "40"; missing where the name tells none
                modal-eval.stage       "final"; missing where the name tells none
    related     prefect.resource.id    s3://BUCKET
                prefect.resource.role  bucket
                prefect.resource.name  BUCKET
    payload     bucket, prefix, run, step (a number or null), stage (a text or null), revision, model (s3://BUCKET/PREFIX)

Every key of the payload is always there, so a trigger's template may name it. The id is made from address and content.
"""

import functools
import logging
from datetime import UTC, datetime
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from modal_eval.checkpoints.watching import Announcement
from modal_eval.errors import ModalEvalError

logger = logging.getLogger("modal_eval.events")

CHECKPOINT_CREATED = "checkpoint.created"


class EventNotSentError(ModalEvalError):
    """The Prefect server did not take an event; it is remembered and sent again."""

    retryable = True


def announce_checkpoint(announcement: Announcement, maybe_sent: bool) -> None:
    """Send the event, unless the server has it, and return once it does. Raises `EventNotSentError`.

    The server drops an id that it heard within five minutes, and stores what it heard within seconds. So asking it keeps
    a watch from announcing twice whether it was killed (`maybe_sent`), or has lost what it remembered.
    """
    client = _client(PREFECT_API_URL.value())
    try:
        if _is_there(client, announcement.id):
            logger.info("%s was announced before%s", announcement.address, "" if maybe_sent else ", by another watch")
        else:
            client.request("POST", "/events", json=[event_of(announcement)])
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        raise EventNotSentError(
            f"the Prefect server did not take the event for {announcement.address} ({type(error).__name__}); check "
            "PREFECT_API_URL: what is not announced is sent with the next look"
        ) from error


@functools.cache
def _client(api_url: str) -> Any:
    """One for all events to this server: making it costs more than an event."""
    return get_client(sync_client=True).__enter__()


def _is_there(client: Any, event_id: str) -> bool:
    found = client.request("POST", "/events/filter", json={"filter": {"id": {"id": [event_id]}}, "limit": 1})
    return bool(found.json()["events"])


def event_of(announcement: Announcement) -> dict[str, Any]:
    """The event as Prefect's API takes it; see the head of this file."""
    labels = {
        "prefect.resource.id": announcement.address,
        "prefect.resource.name": announcement.prefix.rpartition("/")[2] or announcement.bucket,
        "modal-eval.run": announcement.run,
        "modal-eval.step": announcement.step,
        "modal-eval.stage": announcement.stage,
    }
    bucket = {
        "prefect.resource.id": f"s3://{announcement.bucket}",
        "prefect.resource.role": "bucket",
        "prefect.resource.name": announcement.bucket,
    }
    return {
        "id": announcement.id,
        "event": CHECKPOINT_CREATED,
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {key: str(value) for key, value in labels.items() if value is not None},
        "related": [bucket],
        "payload": {**announcement.describe(), "model": announcement.address},
    }
