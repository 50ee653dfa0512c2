"""What a person or a schedule asks for, and how the flows' parameters say it.

A flow's parameters are flat, because Prefect lays what is given over a deployment's defaults without looking inside: a
mapping replaces a mapping whole. What the benchmark's YAML says is read inside the flow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from modal_eval.config.models import Overrides, Section, Target

REPOSITORY = r"[\w.-]+/[\w.-]+"
"""A repository of the Hub, `owner/name`."""

# Types of parameters: what they mean stands in each flow's docstring, where Prefect's form takes it from.
ModelName = Annotated[str, Field(min_length=1)]
BenchmarkName = Annotated[str, Field(min_length=1)]
SuiteName = Annotated[str, Field(min_length=1)]
NumExamples = Annotated[int, Field(ge=1)]
RepositoryName = Annotated[str, Field(pattern=f"^{REPOSITORY}$")]
AtOnce = Annotated[int, Field(ge=1)]
BaselineName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
Where = Literal["pools", "here"]
"""`pools` gives each benchmark's run to the workers of its deployment, `here` starts them on the machine of the suite."""


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
    run_id: str | None = None
    """Without a `run_dir`, how the run's folder is called; left out, it gets a random name."""
    push_to_hub: Annotated[str, Field(pattern=f"^{REPOSITORY}$")] | None = None
    """Data-set repository `owner/name` that the finished run is pushed to, private if it is new."""

    def with_settings(self, *, target: Target | None, num_examples: int | None) -> Self:
        """The same request with the two settings that a flow's form names by themselves; `None` changes nothing."""
        return self.model_copy(update={"overrides": with_settings(self.overrides, target, num_examples)})


def with_settings(overrides: Overrides, target: Target | None, num_examples: int | None) -> Overrides:
    """`overrides` with the two settings that a flow's form names by themselves; `None` changes nothing."""
    given = overrides.model_dump()
    for section, key, value in (("infra", "target", target), ("eval", "num_examples", num_examples)):
        if value is not None:
            given.setdefault(section, {})[key] = value
    return Overrides.model_validate(given)


class SuiteRequest(Section):
    """One model on every benchmark of a suite, or such a suite to finish."""

    model: str
    """As of a run."""
    suite: str
    """Name of a file in `benchmark_configs/suites/`, or the path of a YAML file."""
    overrides: Overrides = Overrides()
    """Settings of every benchmark; they win over the suite's."""
    where: Where = "pools"
    """Whether workers take the runs, or this machine."""
    suite_dir: Path | None = None
    """Folder of the suite; one that holds a suite is finished."""
    suite_id: str | None = None
    """Without a `suite_dir`, how the folder is called; left out, it gets a random name."""
    queue: str | None = None
    """Queue that its runs wait in, with `where: pools`; left out, that of each deployment."""
    modal_account: str | None = None
    """Name of a Modal Account block that its runs act for, with `where: pools`."""
