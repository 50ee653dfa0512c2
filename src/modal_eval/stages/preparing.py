"""Prepare: everything that can be found out, checked and pinned before a server costs anything."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modal_eval import __version__, harnesses, paths, serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.identity import file_sha256, full_identity
from modal_eval.config.models import RunConfig
from modal_eval.harnesses.environment import environment_for
from modal_eval.harnesses.job import HarnessJob, Phase
from modal_eval.harnesses.run import describe
from modal_eval.records import PreparedModel
from modal_eval.results.files import read_json, write_json
from modal_eval.results.progress import timed
from modal_eval.results.run_folder import Run

ENVIRONMENTS = Path(harnesses.__file__).parent
FACTS = ("harness", "environment", "data")
"""What a harness says of itself when it starts: it has to be the same each time."""
DATA_VARIABLES = ("HUMANEVAL_OVERRIDE_PATH", "MBPP_OVERRIDE_PATH")
"""Variables by which EvalPlus reads its data from a file."""


def prepare(run_dir: Path) -> dict[str, Any]:
    """Resolve the model, load the environment once, and make the folder belong to what was found.

    Raises `CheckpointError` for a model that cannot be loaded, `HarnessError` for an environment that cannot, and
    `IdentityError` when the folder holds answers of another configuration.
    """
    run = Run.load(run_dir)
    with timed(run_dir, "environment"):
        python = environment_for(run.config)
    with timed(run_dir, "prepare"):
        model = resolve_model(serving.placed(run.config))
        start = describe(
            harness_job(run.config, base_url="http://127.0.0.1:9/v1", model=model.served_name), run_dir, python
        )
        facts = {name: getattr(start, name) for name in FACTS}
        # `sha256` covers the prompts too; scoring again needs them by themselves
        data = {key: value for key, value in start.data.items() if key != "prompts_sha256"}
        run.claim_identity(full_identity(run.config, model, {**facts, "data": data}))
        prepared = {
            "model": {
                **asdict(model),
                "path": str(model.path) if model.path else None,
                "chat_template": str(model.chat_template) if model.chat_template else None,
            },
            "total_examples": start.total_examples,
            **facts,
        }
        write_json(run_dir / paths.PREPARED, prepared)
    return {"total_examples": start.total_examples, **facts}


def fingerprint(run_dir: Path) -> str:
    """Short hash of what `prepare` looks at, files by name, size and time: equal means it would find the same.

    Only what is looked at in no time. What is left out, such as the modules of packages and data without a pinned revision,
    is compared when the harness starts. For a model on S3 never equal: it may be another by now, or no longer in the cache.
    """
    run = Run.load(run_dir)
    config, root = run.config, paths.project_root()
    if config.model.startswith("s3://"):
        return secrets.token_hex(8)
    looked_at = [*sorted((root / "requirements").glob("*.txt")), *sorted(ENVIRONMENTS.rglob("*.py"))]
    looked_at += [*files_below(Path(config.model)), *environment_files(config)]
    template = root / "benchmark_configs" / "templates" / f"{config.chat_template}.jinja"
    settings = [
        config.eval.module_paths,
        config.eval.environment,
        {name: os.environ.get(name) for name in DATA_VARIABLES},
        file_sha256(template) if template.is_file() else None,
    ]
    seen = [(str(path), stat.st_size, stat.st_mtime_ns) for path in looked_at if (stat := path.stat())]
    return hashlib.sha256(json.dumps([__version__, run.fingerprint(), settings, seen]).encode()).hexdigest()[:16]


def environment_files(config: RunConfig) -> Iterator[Path]:
    """Where the environment's code and data stand, as far as a look into few folders tells."""
    module = config.env_id.split("/")[-1].split("@")[0].replace("-", "_")
    for folder in map(Path, config.eval.module_paths):
        yield from filter(Path.is_file, sorted(folder.glob("*.py")))
        yield from files_below(folder / module)
    if config.eval.environment:
        place = Path(config.eval.environment).expanduser()
        packages = (place.parent.parent if place.is_file() else place).glob("lib/python3*/site-packages/*.dist-info")
        yield from sorted(packages)
    if config.eval.harness == "lm_eval":
        given = config.env_args.get("include_path") or []
        folders = [given] if isinstance(given, str) else given
        for folder in (paths.project_root() / "benchmark_configs" / "lm_eval_tasks", *map(Path, folders)):
            yield from files_below(folder)
    for name in DATA_VARIABLES:
        if named := os.environ.get(name):
            yield from files_below(Path(named))


def files_below(place: Path) -> list[Path]:
    """The file `place`, or the files of that folder, but for what Python writes there when it imports them."""
    if place.is_file():
        return [place]
    return sorted(path for path in place.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def model_is_here(run_dir: Path) -> bool:
    """Whether the model that `prepare` found is on this machine, and not on the node that began the run."""
    model, _ = read_prepared(run_dir)
    return all(path is None or path.exists() for path in (model.path, model.chat_template))


def read_prepared(run_dir: Path) -> tuple[PreparedModel, dict[str, Any]]:
    """What `prepare` found: the model, and the facts of the environment."""
    prepared = read_json(run_dir / paths.PREPARED)
    model = dict(prepared["model"])
    for key in ("path", "chat_template"):
        model[key] = Path(model[key]) if model[key] else None
    return PreparedModel(**model), prepared


def harness_job(
    config: RunConfig,
    *,
    base_url: str,
    model: str,
    done: frozenset[tuple[int, int]] = frozenset(),
    phase: Phase = "generate",
) -> HarnessJob:
    """What the harness has to do for `config`, less the rollouts that are `done`.

    What is scored while it is generated, as OLMES and most verifiers environments are, is so in either phase.
    """
    return HarnessJob(
        env_id=config.env_id,
        env_args=config.env_args,
        base_url=base_url,
        model=model,
        sampling=config.sampling.model_dump(mode="json", exclude_none=True),
        num_examples=config.eval.num_examples,
        rollouts=config.eval.rollouts,
        max_concurrent=config.eval.max_concurrent,
        rollout_timeout_s=config.eval.rollout_timeout,
        done=done,
        harness=config.eval.harness,
        phase=phase,
        scoring_args=tuple(config.scoring_args),
        scoring_workers=config.eval.scoring_workers,
        api=config.eval.harness_api,
        module_paths=tuple(Path(folder).expanduser().resolve() for folder in config.eval.module_paths),
    )
