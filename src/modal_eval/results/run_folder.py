"""A run's folder: where it stands, who owns it, what configuration it holds.

`outputs/evals/{env_id}--{org}--{model}/{run_id}/`, with `run_config.json` written before anything else happens.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from modal_eval import __version__, paths
from modal_eval.config.identity import Identity, config_identity, differences, identity_sha256
from modal_eval.config.load import checked, kept_name, split_revision
from modal_eval.config.models import RunConfig
from modal_eval.errors import ConfigError, IdentityError, RunLockedError
from modal_eval.results.files import read_json, write_json


@dataclass(frozen=True, slots=True)
class Run:
    """One run: a folder and the configuration that it holds."""

    run_dir: Path
    config: RunConfig

    @property
    def run_id(self) -> str:
        return self.run_dir.name

    @classmethod
    def create(cls, config: RunConfig, run_dir: Path | None = None) -> Self:
        """Make the folder (a fresh one below the output root, unless `run_dir` names it) and write `run_config.json`."""
        run_dir = (run_dir or fresh_run_dir(config)).absolute()
        try:
            paths.logs_dir(run_dir).mkdir(parents=True, exist_ok=True)
            run = cls(run_dir, config)
            write_json(run_dir / paths.RUN_CONFIG, run.describe())
        except OSError as error:
            raise ConfigError(
                f"the run folder {run_dir} cannot be written ({error.strerror or error}); choose another place with "
                "MODAL_EVAL_OUTPUT_DIR or --run-dir"
            ) from error
        return run

    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Read a run back. Raises `ConfigError` when the folder is not a run."""
        path = run_dir / paths.RUN_CONFIG
        if not path.is_file():
            raise ConfigError(
                f"{run_dir} is no run folder (it has no {paths.RUN_CONFIG}); `modal-eval runs` lists runs"
            )
        data = read_json(path)
        if "config" not in data:
            raise ConfigError(f"{path} was not written by this tool (it has no 'config'); start a new run")
        return cls(run_dir.absolute(), checked(RunConfig, data["config"], where=str(path)))

    def describe(self) -> dict[str, Any]:
        """`run_config.json`: the keys that the team's other tools read, then everything needed to run again."""
        config = self.config
        return {
            "model_id": config.model,
            "model_slug": model_slug(config.model),
            "benchmark": {
                "name": config.name,
                "env_id": config.env_id,
                "sampling": config.sampling.model_dump(mode="json"),
            },
            "server_profile": {"gpu": config.infra.gpu, **config.vllm.model_dump(mode="json")},
            "sampling": config.sampling.model_dump(mode="json", exclude_none=True),
            "rollouts": config.eval.rollouts,
            "chat_template": config.chat_template,
            "started_at": now(),
            "checkpoint_dir": str(self.run_dir),
            "app_name": None,
            "modal_url": None,
            "run_id": self.run_id,
            "modal_eval_version": __version__,
            "config": config.model_dump(mode="json"),
        }

    def update(self, **facts: Any) -> None:
        """Add facts to `run_config.json`, such as the server's address once it is known."""
        path = self.run_dir / paths.RUN_CONFIG
        write_json(path, {**read_json(path), **facts})

    def identity(self) -> Identity | None:
        """The identity this folder's answers belong to; `None` before anything was prepared."""
        found = read_json(self.run_dir / paths.RUN_CONFIG).get("identity")
        return found if isinstance(found, dict) else None

    def fingerprint(self) -> str:
        """Short hash of what is asked and how much of it, for caches."""
        asked = self.config.eval.model_dump(include={"num_examples", "rollouts"})
        return identity_sha256({"identity": config_identity(self.config), "eval": asked})[:16]

    def claim_identity(self, identity: Identity) -> None:
        """Make this folder belong to `identity`; refuse any other than the one it belongs to."""
        if before := self.identity():
            refuse_other_identity(self.run_dir, before, identity)
            identity = {**before, **identity}
        self.set_identity(identity)

    def set_identity(self, identity: Identity) -> None:
        self.update(identity=identity, identity_sha256=identity_sha256(identity))


def refuse_other_identity(run_dir: Path, before: Identity, now: Identity) -> None:
    """Raise `IdentityError` naming every key of `now` that has another value in `before`.

    Keys that only `before` has are left alone: what is known early is compared early, the rest once it is known.
    """
    known = {key: value for key, value in before.items() if key in now}
    found = [f"{key}: {was!r} in the folder, {is_!r} now" for key, was, is_ in differences(known, now)]
    if found:
        raise IdentityError(
            f"{run_dir} belongs to another configuration ({'; '.join(found)}); its answers cannot be used for this one. "
            "Start a new run without --run-dir, or go back to the old settings"
        )


def model_slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")


def run_group(config: RunConfig) -> str:
    """`{env_id}--{org}--{model}`; a local path counts by its last two parts, a name without an owner stands alone."""
    parts = [part for part in re.split(r"[/\\]+", config.model.removeprefix("s3:")) if part not in ("", ".", "..")]
    return "--".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part) for part in (config.env_id, *parts[-2:]))


def fresh_run_dir(config: RunConfig) -> Path:
    return folder_called(secrets.token_hex(4), config)


def folder_called(run_id: str, config: RunConfig) -> Path:
    """The folder of a run of `config` whose name is known beforehand."""
    return paths.output_root() / run_group(config) / run_id


def now() -> str:
    return datetime.now(UTC).isoformat()


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder for writing; the kernel frees it however the holder dies.

    Raises `RunLockedError` with the holder's host and pid when somebody else has it.
    """
    path = run_dir / paths.LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096).decode(errors="replace").strip() or "another process"
            raise RunLockedError(
                f"{run_dir} is being written by {holder}; wait for it, or start a run of your own without --run-dir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()} since {now()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_locked(run_dir: Path) -> bool:
    """Whether a live process writes this folder now."""
    try:
        descriptor = os.open(run_dir / paths.LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def find_runs(root: Path | None = None) -> list[Path]:
    """Every run folder below the output root, newest first."""
    root = root or paths.output_root()
    found = [path.parent for path in root.glob(f"*/*/{paths.RUN_CONFIG}")]
    started = {run_dir: str(_read_config(run_dir).get("started_at", "")) for run_dir in found}
    return sorted(found, key=lambda run_dir: started[run_dir], reverse=True)


def _read_config(run_dir: Path) -> dict[str, Any]:
    """A run's config for listing; one that cannot be read is listed without its facts."""
    try:
        data = read_json(run_dir / paths.RUN_CONFIG)
    except (OSError, json.JSONDecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def run_facts(run_dir: Path) -> dict[str, Any]:
    """What `modal-eval runs` shows of one run."""
    config = _read_config(run_dir)
    metadata = read_json(path) if (path := run_dir / paths.METADATA).is_file() else {}
    meta = read_json(path) if (path := run_dir / paths.CHECKPOINT_META).is_file() else {}
    status = "running" if is_locked(run_dir) else metadata.get("status", "interrupted")
    return {
        "run_id": run_dir.name,
        "benchmark": config.get("benchmark", {}).get("name"),
        "model": config.get("model_id"),
        "revision": config.get("config", {}).get("vllm", {}).get("revision"),
        "status": status,
        "started_at": config.get("started_at"),
        "finished_rollouts": meta.get("completed_rollouts", 0),
        "total_rollouts": meta.get("total_rollouts"),
        "avg_reward": metadata.get("avg_reward"),
        "stderr": metadata.get("stderr"),
        "run_dir": str(run_dir),
    }


def is_asked_for(facts: dict[str, Any], model: str | None, benchmark: str | None) -> bool:
    """Whether `-m model -b benchmark`, as `modal-eval run` takes them, mean the run of these facts; `None` means any.

    A model without a revision means all of its revisions.
    """
    name, revision = split_revision(model) if model else (None, None)
    in_parts = name == facts["model"] and revision in (None, facts["revision"])
    same_model = in_parts or model in (None, facts["model"])
    return same_model and (benchmark is None or kept_name(benchmark) == facts["benchmark"])


def latest_incomplete(model: str | None, benchmark: str | None) -> Path:
    """The newest run of `model` and `benchmark` that is neither complete nor being written now."""
    for run_dir in find_runs():
        facts = run_facts(run_dir)
        if facts["status"] in ("complete", "running"):
            continue
        if is_asked_for(facts, model, benchmark):
            return run_dir
    wanted = " and ".join(f"{flag} {value}" for flag, value in (("-m", model), ("-b", benchmark)) if value)
    raise ConfigError(
        f"no incomplete run{f' for {wanted}' if wanted else ''} below {paths.output_root()}; `modal-eval runs` lists all"
    )
