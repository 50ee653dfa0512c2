"""Suites: lists of benchmarks that one model is evaluated on, one YAML each in `benchmark_configs/suites/`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from modal_eval.config.load import checked, load_benchmark, merge, read_named, resolve
from modal_eval.config.models import Overrides, RunConfig, Section
from modal_eval.paths import project_root


def named(value: Any) -> Any:
    """A benchmark's name alone is an entry, too."""
    return {"benchmark": value} if isinstance(value, str) else value


class SuiteEntry(Section):
    """One benchmark of a suite."""

    benchmark: str
    """Name of a file in `benchmark_configs/`, or the path of a YAML file."""
    overrides: Overrides = Overrides()
    """Settings that differ from the benchmark's, in this suite."""

    @property
    def name(self) -> str:
        return Path(self.benchmark).stem


class SuiteConfig(Section):
    """One file of `benchmark_configs/suites/`."""

    name: str = ""
    """Taken from the file's name."""
    description: str = ""
    """One line for `modal-eval suite --help` and Prefect's UI."""
    stage: str = ""
    """Stage of training that the suite is for, such as `post-SFT`: a tag of its runs."""
    overrides: Overrides = Overrides()
    """Settings of all its benchmarks; an entry's own win."""
    benchmarks: Annotated[list[Annotated[SuiteEntry, BeforeValidator(named)]], Field(min_length=1)]
    """Names of benchmarks, or entries with `benchmark` and `overrides`."""

    @model_validator(mode="after")
    def check_names(self) -> SuiteConfig:
        names = [entry.name for entry in self.benchmarks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(
                f"{', '.join(sorted(twice))} stands in the suite twice; a table has one row a benchmark: copy its YAML under "
                "another name to ask it in two ways"
            )
        return self


def suite_files() -> dict[str, Path]:
    """Every shipped suite by name."""
    return {path.stem: path for path in sorted((project_root() / "benchmark_configs" / "suites").glob("*.yaml"))}


def load_suite(name: str) -> SuiteConfig:
    """Read a suite by its name, or from a YAML file by its path.

    Raises `ConfigError` that names the nearest suite or key, and for a benchmark that does not exist.
    """
    path, data = read_named("suite", name, suite_files(), option="-s", page="docs/suites.md")
    suite = checked(SuiteConfig, {"name": path.stem, **data}, where=str(path))
    for entry in suite.benchmarks:
        load_benchmark(entry.benchmark)
    return suite


def settings_of(suite: SuiteConfig, entry: SuiteEntry, given: Overrides) -> Overrides:
    """What one benchmark of a suite is run with: the suite's settings, the entry's over them, and `given` over both."""
    merged = merge(merge(suite.overrides.model_dump(), entry.overrides.model_dump()), given.model_dump())
    return Overrides.model_validate(merged)


def resolve_suite(model: str, suite: SuiteConfig, given: Overrides) -> dict[str, RunConfig]:
    """The configuration of each benchmark, all checked before anything is started. Raises `ConfigError`."""
    return {
        entry.name: resolve(model, load_benchmark(entry.benchmark), settings_of(suite, entry, given))
        for entry in suite.benchmarks
    }


def serving_key(config: RunConfig) -> str:
    """Short hash of what is known of a server before the model is looked at: benchmarks with the same key may share one."""
    infra = config.infra.model_dump(
        mode="json", include={"target", "engine", "base_url", "environment", "gpu", "secrets", "lifetime"}
    )
    content = {"infra": infra, "vllm": config.vllm.model_dump(mode="json")}
    return hashlib.sha256(json.dumps([config.model, content], sort_keys=True).encode()).hexdigest()[:12]
