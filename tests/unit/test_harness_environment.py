"""Which Python a configuration's harness runs with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from modal_eval.config.models import EvalConfig, InfraConfig, RunConfig
from modal_eval.errors import ConfigError, EngineEnvError
from modal_eval.harnesses import environment_for


def config(**settings: Any) -> RunConfig:
    infra = InfraConfig(target="endpoint", base_url="http://127.0.0.1:1/v1")
    return RunConfig(model="m", env_id="gsm8k", infra=infra, eval=EvalConfig(**settings))


def test_a_named_environment_is_taken_as_it_is() -> None:
    assert environment_for(config(environment=sys.prefix)) == Path(sys.prefix) / "bin" / "python"


def test_a_named_environment_without_a_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineEnvError, match="no bin/python"):
        environment_for(config(environment=str(tmp_path)))


def test_packages_cannot_be_added_to_the_teams_own_environment() -> None:
    with pytest.raises(ConfigError, match="drop eval.packages"):
        environment_for(config(environment=sys.prefix, packages=["my-env==1.0"]))
