"""Options that several commands share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from modal_eval.config.models import Overrides
from modal_eval.config.request import REPOSITORY

Model = Annotated[
    str,
    Parameter(
        name=["-m", "--model"],
        env_var="MODAL_EVAL_MODEL",
        help="Hub id[@revision], folder, GGUF file, s3://… address, or an endpoint's name.",
    ),
]
Benchmark = Annotated[
    str,
    Parameter(
        name=["-b", "--benchmark"],
        env_var="MODAL_EVAL_BENCHMARK",
        help="A name from `modal-eval benchmarks`, or a YAML file.",
    ),
]
Settings = Annotated[Overrides | None, Parameter(name="*", help="Settings that differ from the benchmark's.")]
HiddenSettings = Annotated[Overrides | None, Parameter(name="*", show=False)]
"""Settings of which a command takes a few, which its own help names; any other is refused with its reason."""
Json = Annotated[bool, Parameter(name="--json", help="Data on stdout as JSON, talk on stderr.")]
RunDir = Annotated[Path | None, Parameter(name="--run-dir", help="Folder of the run; one that holds a run is resumed.")]


def check_repository(_type: Any, value: str | None) -> None:
    """Refuse here what `RunRequest` would refuse, in words of the command line."""
    if value is not None and not re.fullmatch(REPOSITORY, value):
        raise ValueError("A data-set repository is owner/name.")


PushToHub = Annotated[
    str | None,
    Parameter(
        name="--push-to-hub",
        validator=check_repository,
        help="Push the finished run to this data-set repository, owner/name.",
    ),
]


def typed(overrides: Overrides | None) -> Overrides:
    """Give free-form values their types: `--env.limit=5` is a number, `--env.mode=fast` a text, as in YAML."""
    if overrides is None:
        return Overrides()
    given = overrides.model_dump(exclude_unset=True)
    if "env" in given:
        given["env"] = _typed(given["env"])
    if "extra_args" in given.get("vllm", {}):
        given["vllm"]["extra_args"] = _typed(given["vllm"]["extra_args"])
    return Overrides.model_validate(given)


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value
