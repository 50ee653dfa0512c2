"""Scores to measure against."""

from prefect.blocks.core import Block
from pydantic import Field


class Baseline(Block):
    """Scores of one model that later ones are measured against. Names of benchmarks are those of `modal-eval benchmarks`."""

    _block_type_name = "Baseline"
    _block_type_slug = "baseline"
    _description = "Scores of one model that later ones are measured against."

    model: str = Field(description="The model that was measured, with its revision where it has one.")
    scores: dict[str, float] = Field(description="Benchmark to score, as a share between 0 and 1.")
    stderr: dict[str, float] = Field(default={}, description="Benchmark to the score's standard error.")
    source: str = Field(default="", description="Who measured it and how, such as a run's folder or a paper.")
