"""What a person or a schedule asks for: the one parameter of the `eval` flow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from modal_eval.config.models import Overrides, Section

REPOSITORY = r"[\w.-]+/[\w.-]+"
"""A repository of the Hub, `owner/name`."""


class RunRequest(Section):
    """One evaluation: a model on a benchmark, or an interrupted run to finish."""

    model: str | None = None
    """Hub id (with @revision if wanted), folder, GGUF file, or the name an endpoint knows the model by."""
    benchmark: str | None = None
    """Name of a file in `benchmark_configs/`, or the path of a YAML file."""
    overrides: Overrides = Overrides()
    """Settings that differ from the benchmark's."""
    run_dir: Path | None = None
    """Folder of the run; one that already holds a run is resumed."""
    push_to_hub: Annotated[str, Field(pattern=f"^{REPOSITORY}$")] | None = None
    """Data-set repository `owner/name` that the finished run is pushed to, private if it is new."""
