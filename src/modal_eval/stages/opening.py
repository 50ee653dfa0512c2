"""From a request to a run folder: nothing is started before this has agreed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from modal_eval import paths, serving
from modal_eval.config.identity import config_identity, differences
from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import BenchmarkConfig, RunConfig
from modal_eval.config.request import RunRequest
from modal_eval.errors import ConfigError, IdentityError
from modal_eval.results.rows import is_scored, read_rows
from modal_eval.results.run_folder import Run, folder_called, fresh_run_dir, locked, refuse_other_identity


def plan_run(request: RunRequest) -> Run:
    """The run that `request` means: its configuration and its folder. Writes nothing.

    A folder that already holds a run is resumed: settings that do not change an answer may differ (concurrency, limits,
    more examples), any other difference is refused by name, and so is another scorer than that of the rows there.
    """
    run_dir = request.run_dir.expanduser() if request.run_dir else None
    if run_dir is None and request.run_id:
        run_dir = folder_called(request.run_id, _config(request, None))
    existing = Run.load(run_dir) if run_dir and (run_dir / paths.RUN_CONFIG).is_file() else None
    config = _config(request, existing)
    run = Run((run_dir or fresh_run_dir(config)).absolute(), config)
    if existing and (before := existing.identity()):
        refuse_other_identity(existing.run_dir, before, config_identity(config))
    if existing:
        refuse_other_scorer(existing, config)
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


def refuse_other_scorer(existing: Run, config: RunConfig) -> None:
    """Raise `IdentityError` that names each scoring argument with another value than the folder's scores were made with.

    They are no part of the identity, because `modal-eval score` changes them for all rows at once. A resume leaves the rows
    that have a score as they are, and one number would come from two scorers.
    """
    names = sorted({*existing.config.scoring_args, *config.scoring_args})
    before, now = ({name: one.env_args.get(name) for name in names} for one in (existing.config, config))
    changed = [name for name in names if before[name] != now[name]]
    if not changed or not any(map(is_scored, read_rows(existing.run_dir / paths.RESULTS))):
        return
    found = [
        f"{key}: {was!r} in the folder, {is_!r} now"
        for name in changed
        for key, was, is_ in differences(before[name], now[name], f"env_args.{name}.")
    ]
    options = [shlex.quote(f"--env.{name}={_typed(now[name])}") for name in changed]
    raise IdentityError(
        f"{existing.run_dir} has rows that another scorer scored ({'; '.join(found)}), and a run has one scorer. `modal-eval "
        f"score {existing.run_dir} {' '.join(options)}` scores them all again, from the journal; or go back to the old settings"
    )


def _typed(value: object) -> str:
    """A value as one types it behind `--env.KEY=`."""
    return value if isinstance(value, str) else json.dumps(value)


def open_run(request: RunRequest) -> Path:
    """Make or update the run folder of `request` and return it."""
    run = plan_run(request)
    if (run.run_dir / paths.RUN_CONFIG).is_file():
        with locked(run.run_dir):
            run.update(config=run.config.model_dump(mode="json"), rollouts=run.config.eval.rollouts)
    else:
        run = Run.create(run.config, run.run_dir)
    return run.run_dir
