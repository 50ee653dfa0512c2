"""Prepare: everything that can be found out, checked and pinned before a server costs anything."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modal_eval import __version__, harnesses, paths, serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.identity import full_identity
from modal_eval.config.models import RunConfig
from modal_eval.harnesses.environment import environment_for
from modal_eval.harnesses.job import SCORES_LATER, HarnessJob, Phase
from modal_eval.harnesses.run import describe
from modal_eval.records import PreparedModel
from modal_eval.results.files import read_json, write_json
from modal_eval.results.progress import timed
from modal_eval.results.run_folder import Run

ENVIRONMENTS = Path(harnesses.__file__).parent


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
        facts = {"harness": start.harness, "environment": start.environment, "data": start.data}
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
    """Short hash of everything that `prepare` looks at, by name, size and time: equal means it would find the same.

    For a model on S3 never equal: it may be another by now, or no longer in the cache.
    """
    run = Run.load(run_dir)
    if run.config.model.startswith("s3://"):
        return secrets.token_hex(8)
    root = paths.project_root()
    looked_at = [*sorted((root / "requirements").glob("*.txt")), *sorted(ENVIRONMENTS.rglob("*.py"))]
    model = Path(run.config.model)
    if model.exists():
        looked_at += sorted(model.rglob("*")) if model.is_dir() else [model]
    seen = [(str(path), stat.st_size, stat.st_mtime_ns) for path in looked_at if (stat := path.stat())]
    return hashlib.sha256(json.dumps([__version__, run.fingerprint(), seen]).encode()).hexdigest()[:16]


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

    A harness that scores while it generates does both in either phase.
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
        phase=phase if config.eval.harness in SCORES_LATER else "both",
        scoring_args=tuple(config.scoring_args),
        scoring_workers=config.eval.scoring_workers,
        api=config.eval.harness_api,
        module_paths=tuple(Path(folder).expanduser().resolve() for folder in config.eval.module_paths),
    )
