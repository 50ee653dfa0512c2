"""What the Prefect UI shows of a run beside its tasks. Our own files hold all of it: a server that does not answer costs the
picture, not the run."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, runtime
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate

from modal_eval import paths
from modal_eval.results.progress import percent_done

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 5.0
LAST_SHARE_S = 2.0
"""Longer than a server takes that is there; one that is away is not worth a GPU."""
OUTCOME = "outcome"
"""Entry of an artifact's metadata that says: the other entries are a run's outcome, for a suite on another machine."""


def key_of(*words: str) -> str:
    """A key as Prefect takes it: small letters, digits and dashes; the same key makes one timeline in the UI."""
    return "-".join("".join(c if c.isalnum() and c.isascii() else "-" for c in word.lower()) for word in words).strip(
        "-"
    )


def publish(
    kind: str, key: str, data: Any, description: str = "", outcome: dict[str, Any] | None = None
) -> UUID | None:
    """Make an artifact of the task run that goes on; `None` when the server does not take it, however long that takes."""
    return send(artifact_of(kind, key, data, description, outcome))


def artifact_of(
    kind: str, key: str, data: Any, description: str = "", outcome: dict[str, Any] | None = None
) -> ArtifactCreate:
    return ArtifactCreate(
        type=kind,
        key=key,
        data=json.dumps(data) if kind == "table" else data,
        description=description,
        **({"metadata_": packed(outcome)} if outcome else {}),
        flow_run_id=runtime.flow_run.id,
        **({"task_run_id": runtime.task_run.id} if runtime.task_run.id else {}),
    )


def send(artifact: ArtifactCreate) -> UUID | None:
    try:
        with get_client(sync_client=True) as client:
            return client.create_artifact(artifact).id
    except Exception as error:  # noqa: BLE001 - whatever is wrong there, an evaluation does not need it
        logger.warning("the artifact %s is not in Prefect: %s: %s", artifact.key, type(error).__name__, error)
        return None


def beside(work: Callable[..., object], *arguments: Any) -> threading.Thread:
    """A thread for `work` with our settings: without them Prefect's client would start a server of its own."""
    return threading.Thread(target=copy_context().run, args=(work, *arguments), name=work.__name__, daemon=True)


def publish_link(key: str, url: str, text: str, description: str = "") -> None:
    """Make it in the background: who holds a GPU waits for no Prefect server."""
    artifact = artifact_of("markdown", key, f"[{text}]({url})", description)
    beside(send, artifact).start()


@contextmanager
def progress_shown(run_dir: Path, key: str, description: str) -> Iterator[None]:
    """Show in the UI, every few seconds, how much of a run is generated while the block lasts.

    In the background, and the block's end waits for the last share no longer than `LAST_SHARE_S`.
    """
    artifact, over = artifact_of("progress", key, percent_done(run_dir), description), threading.Event()
    watching = beside(_follow, artifact, run_dir, over)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join(LAST_SHARE_S)


def _follow(artifact: ArtifactCreate, run_dir: Path, over: threading.Event) -> None:
    made = send(artifact)
    if made is None:
        return
    shown = artifact.data
    with get_client(sync_client=True) as client:
        while True:
            last = over.wait(PROGRESS_INTERVAL_S)
            if (share := percent_done(run_dir)) != shown:
                try:
                    client.update_artifact(made, ArtifactUpdate(data=share))
                    shown = share
                except Exception as error:  # noqa: BLE001 - it is tried again with the next share
                    logger.debug("progress is not in Prefect: %s", error)
            if last:
                return


def outcome_of_flow_run(client: Any, flow_run_id: UUID) -> dict[str, Any] | None:
    """What a run on another machine has published as its outcome; of several attempts the last."""
    body = {
        "artifacts": {"flow_run_id": {"any_": [str(flow_run_id)]}, "type": {"any_": ["table"]}},
        "sort": "CREATED_DESC",
    }
    for one in client.request("POST", "/artifacts/filter", json=body).json():
        metadata = one.get("metadata_") or {}
        if metadata.pop(OUTCOME, None):
            return {key: json.loads(text) for key, text in metadata.items()}
    return None


def packed(outcome: dict[str, Any]) -> dict[str, str]:
    """One entry a key: Prefect cuts each entry of an artifact's metadata off at 500 characters, without a word."""
    return {OUTCOME: "true", **{key: json.dumps(value) for key, value in outcome.items()}}


def logs_of(run_dir: Path) -> list[str]:
    """Every log file that the run has written so far."""
    return sorted(str(path) for path in paths.logs_dir(run_dir).glob("*.log"))
