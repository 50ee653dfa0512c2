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

ModelName = Annotated[
    str,
    Field(
        min_length=1,
        description="Hub id (with @revision if wanted), folder, GGUF file, s3://… address, or an endpoint's name.",
    ),
]
BenchmarkName = Annotated[
    str, Field(min_length=1, description="A name from `modal-eval benchmarks`, or the path of a YAML file.")
]
TargetName = Annotated[
    Target | None, Field(description="Where the server runs: `infra.target`. Left out, as the benchmark's YAML says.")
]
NumExamples = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Field(description="Only the first N examples: `eval.num_examples`. Left out, as the benchmark's YAML says."),
]
RepositoryName = Annotated[
    Annotated[str, Field(pattern=f"^{REPOSITORY}$")] | None,
    Field(description="Data-set repository `owner/name` that the finished run is pushed to, private if it is new."),
]
Settings = Annotated[
    Overrides, Field(description="Any setting that differs from the benchmark's; what is left empty stays as it is.")
]
RunFolder = Annotated[
    Path | None,
    Field(
        description="Folder of the run on the machine that works on it; one that holds a run is resumed. Left out, the "
        "flow run's id names it, so that a retry goes on where the run was."
    ),
]


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


SuiteName = Annotated[
    str, Field(min_length=1, description="A file in `benchmark_configs/suites/`, or the path of a YAML file.")
]
Where = Literal["pools", "here"]
Place = Annotated[
    Where,
    Field(
        description="`pools` gives each benchmark's run to the workers of its deployment, `here` starts them on the machine "
        "that the suite runs on."
    ),
]
AtOnce = Annotated[int, Field(ge=1, description="Benchmarks that are worked on at a time.")]
SuiteFolder = Annotated[
    Path | None,
    Field(
        description="Folder of the suite's result; one that holds a suite is finished. Left out, the flow run's id names it."
    ),
]


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
