"""What is said of a new checkpoint, and what it is called."""

from __future__ import annotations

import re
import uuid
from dataclasses import asdict, dataclass
from typing import Any, Self

from modal_eval.checkpoints.resolve import step_and_stage
from modal_eval.checkpoints.s3_objects import Address

STEP_OR_STAGE = re.compile(
    r"(?:^|[_-])(?:(?:global[_-]?)?(?:step|checkpoint)[-_]?\d+|final|sft|dpo|rl|base|instruct)$", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Announcement:
    """One content at one address."""

    bucket: str
    prefix: str
    run: str
    """Name of the training run: `math` of `job-7/math_step40`."""
    step: int | None
    stage: str | None
    """`final`, `sft`, `dpo`, `rl`, `base` or `instruct`, where the name ends with it."""
    revision: str
    """`sha256:…` over the files, the same that a run records as its model's revision."""

    @property
    def address(self) -> str:
        return str(Address(self.bucket, self.prefix))

    @property
    def id(self) -> str:
        """The same for the same content at the same address, so that whoever hears it twice can tell."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.address}#{self.revision}"))

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, address: Address, revision: str) -> Self:
        run, step, stage = name_parts(address)
        return cls(address.bucket, address.prefix, run, step, stage, revision)


def name_parts(address: Address) -> tuple[str, int | None, str | None]:
    """(run, step, stage) from the address's last part.

    `job-7/math_step40` → ('math', 40, None); `math_final` → ('math', None, 'final'). Where nothing else is left, as of
    `math/checkpoint-500`, the folder above is the run.
    """
    run = address.name
    while found := STEP_OR_STAGE.search(run):
        run = run[: found.start()]
    above = address.prefix.rpartition("/")[0].rpartition("/")[2]
    return (run.rstrip("_-") or above or address.bucket, *step_and_stage(address.name))
