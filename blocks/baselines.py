"""What later runs are measured against."""

import re
from typing import Any, Self

from prefect.blocks.core import Block
from pydantic import Field


class Baseline(Block):
    """A stored baseline, for nodes that share no disk: what each example of a suite scored once, and under which identity."""

    _block_type_name = "Baseline"
    _block_type_slug = "baseline"
    _description = "What each example of a suite scored once; later runs are measured against it."

    baseline: str = Field(description="Its name, as `nightly` and `modal-eval suite` take it.")
    model: str = Field(description="The model that was measured.")
    made_at: str
    benchmarks: dict[str, Any] = Field(
        description="Benchmark to the identity of its run and the scores of its examples."
    )

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The block of what `baselines/NAME.json` holds."""
        return cls(baseline=document["name"], **{key: document[key] for key in ("model", "made_at", "benchmarks")})

    def document(self) -> dict[str, Any]:
        """What `baselines/NAME.json` holds."""
        return {"name": self.baseline, "model": self.model, "made_at": self.made_at, "benchmarks": self.benchmarks}

    @staticmethod
    def block_name(baseline: str) -> str:
        """Blocks are named by small letters, digits and dashes; a baseline's file is not."""
        return re.sub(r"[^a-z0-9-]", "-", baseline.lower())
