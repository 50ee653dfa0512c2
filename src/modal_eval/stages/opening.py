"""From a request to a run folder: nothing is started before this has agreed."""

from __future__ import annotations

from pathlib import Path

from modal_eval import paths, serving
from modal_eval.config.identity import config_identity
from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import BenchmarkConfig, RunConfig
from modal_eval.config.request import RunRequest
from modal_eval.errors import ConfigError
from modal_eval.results.run_folder import Run, folder_called, fresh_run_dir, locked, refuse_other_identity


def plan_run(request: RunRequest) -> Run:
    """The run that `request` means: its configuration and its folder. Writes nothing.

    A folder that already holds a run is resumed: settings that do not change an answer may differ (concurrency, limits,
    more examples), any other difference is refused by name.
    """
    run_dir = request.run_dir.expanduser() if request.run_dir else None
    if run_dir is None and request.run_id:
        run_dir = folder_called(request.run_id, _config(request, None))
    existing = Run.load(run_dir) if run_dir and (run_dir / paths.RUN_CONFIG).is_file() else None
    config = _config(request, existing)
    run = Run((run_dir or fresh_run_dir(config)).absolute(), config)
    if existing and (before := existing.identity()):
        refuse_other_identity(existing.run_dir, before, config_identity(config))
    if existing is None:
        serving.endpoint_key(config.infra.api_key_env)  # a run to finish may need no server, and so no key
    return run


def _config(request: RunRequest, existing: Run | None) -> RunConfig:
    if existing is None:
        if not request.model or not request.benchmark:
            raise ConfigError("a new run needs a model and a benchmark: -m MODEL -b BENCHMARK")
        return resolve(request.model, load_benchmark(request.benchmark), request.overrides)
    if request.benchmark and request.benchmark != existing.config.name:
        return resolve(request.model or existing.config.model, load_benchmark(request.benchmark), request.overrides)
    held = existing.config.model_dump(exclude={"model"})
    return resolve(request.model or existing.config.model, BenchmarkConfig(**held), request.overrides)


def open_run(request: RunRequest) -> Path:
    """Make or update the run folder of `request` and return it."""
    run = plan_run(request)
    if (run.run_dir / paths.RUN_CONFIG).is_file():
        with locked(run.run_dir):
            run.update(config=run.config.model_dump(mode="json"), rollouts=run.config.eval.rollouts)
    else:
        run = Run.create(run.config, run.run_dir)
    return run.run_dir
