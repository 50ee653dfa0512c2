"""Where things stand on disk; no path is joined in two places."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from modal_eval.errors import ConfigError

RUN_CONFIG = "run_config.json"
PREPARED = "prepared.json"
JOURNAL = "checkpoint.jsonl"
CHECKPOINT_META = "checkpoint_meta.json"
RESULTS = "results.jsonl"
METADATA = "metadata.json"
SCORES = "scores"
HARNESS_RESULTS = "harness_results.json"
PUBLISHED = "published.json"
LOCK = "run.lock"
SUITE = "suite.json"


def project_root() -> Path:
    """The folder that holds `flows/`, `benchmark_configs/` and `requirements/`.

    `MODAL_EVAL_HOME` names it; otherwise it is the checkout that this file stands in, or the nearest folder above the
    working directory that looks like one.
    """
    if home := os.environ.get("MODAL_EVAL_HOME"):
        root = Path(home).expanduser().resolve()
        if not (root / "benchmark_configs").is_dir():
            raise ConfigError(f"MODAL_EVAL_HOME={home} has no benchmark_configs/; point it at a checkout of modal-eval")
        return root
    checkout = Path(__file__).resolve().parents[2]
    for candidate in (checkout, *(Path.cwd() / "x").parents):
        if (candidate / "benchmark_configs").is_dir() and (candidate / "flows").is_dir():
            return candidate
    raise ConfigError(
        "no checkout of modal-eval found (a folder with flows/ and benchmark_configs/); run from inside one or set "
        "MODAL_EVAL_HOME"
    )


def output_root() -> Path:
    """Root of all runs: `MODAL_EVAL_OUTPUT_DIR`, or `outputs/evals` below the working directory."""
    root = os.environ.get("MODAL_EVAL_OUTPUT_DIR") or "outputs/evals"
    if "://" in root:
        raise ConfigError(f"MODAL_EVAL_OUTPUT_DIR={root} is no folder of this machine; give a local path")
    return Path(root)


def state_dir() -> Path:
    """This user's state on this machine, shared by all runs: leases and locks. `MODAL_EVAL_STATE_DIR` moves it."""
    if explicit := os.environ.get("MODAL_EVAL_STATE_DIR"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "modal-eval"


def cache_dir() -> Path:
    """What can be fetched or made again, such as checkpoints from S3. `MODAL_EVAL_CACHE_DIR` moves it."""
    if explicit := os.environ.get("MODAL_EVAL_CACHE_DIR"):
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "modal-eval"


def leases_dir() -> Path:
    return state_dir() / "leases"


def gpu_leases_dir() -> Path:
    """Leases of this machine's GPUs and the queue for them, shared by all users. `MODAL_EVAL_GPU_DIR` moves it.

    `/run/lock` where everybody may write to it, as on Debian and Ubuntu: nothing there is removed for its age, as in
    `/tmp`, or at a logout, as in `/dev/shm`, and what the last boot left is gone.
    """
    if explicit := os.environ.get("MODAL_EVAL_GPU_DIR"):
        return Path(explicit).expanduser().resolve()
    shared = Path("/run/lock")
    open_to_all = stat.S_ISVTX | stat.S_IWOTH
    ours = shared.is_dir() and shared.stat().st_mode & open_to_all == open_to_all
    return (shared if ours else Path("/tmp")) / "modal-eval-gpus"  # noqa: S108 - `gpus.folder` refuses a link there


def environments_dir() -> Path:
    """Virtual environments of harnesses and engines: `.venvs/` of the checkout; `MODAL_EVAL_VENVS` moves it."""
    if explicit := os.environ.get("MODAL_EVAL_VENVS"):
        return Path(explicit).expanduser()
    return project_root() / ".venvs"


def logs_dir(run_dir: Path) -> Path:
    return run_dir / "logs"
