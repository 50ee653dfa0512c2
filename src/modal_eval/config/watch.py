"""What a watch over checkpoints is asked to do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from modal_eval.config.models import Section


class WatchRequest(Section):
    """Where checkpoints land, and when one counts as new."""

    bucket: str | None = None
    """Name of a Checkpoint Bucket block, with its address, queue, memory and credentials. What is given below wins."""
    address: Annotated[str, Field(pattern="^s3://[^/]+")] | None = None
    """`s3://BUCKET/PREFIX`: checkpoints at any depth below it."""
    queue_url: str | None = None
    """SQS queue of the bucket's notifications, which belongs to the watch alone; without one the address is listed."""
    memory: str | None = None
    """Where it is remembered what was announced: a folder of this machine, or `s3://…` for watches on several. Null takes
    `watch/` in this user's state."""
    settle: Annotated[float, Field(ge=0)] = 60
    """A checkpoint is looked at once its newest file is this old, in seconds."""
    max_age: Annotated[float, Field(gt=0)] | None = 172800
    """A checkpoint whose newest file is older is not announced, so that a new watch does not announce the past, in
    seconds; null has no limit. Time for which no watch ran counts."""
    duration: Annotated[float, Field(ge=0)] | None = 0
    """How long to go on, in seconds; 0 looks once, null goes on until it is stopped."""
    interval: Annotated[float, Field(gt=0)] = 30
    """Time from one look to the next, in seconds."""

    @model_validator(mode="after")
    def check_where(self) -> WatchRequest:
        if not self.bucket and not self.address:
            raise ValueError(
                "neither bucket nor address is set; name a Checkpoint Bucket block, or give s3://BUCKET/PREFIX"
            )
        return self
