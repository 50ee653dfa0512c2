"""Push: a copy of the finished run to the Hub; the evaluation stands whatever happens here."""

from __future__ import annotations

from pathlib import Path

from modal_eval import paths
from modal_eval.errors import HubError


def push(run_dir: Path, repo: str) -> str:
    """Push the run folder to the data-set repository `repo` and return its URL.

    `published.json` is there afterwards if, and only if, this push went through.
    """
    from modal_eval.hub import push_run  # huggingface_hub is slow to import, and few runs are pushed

    (run_dir / paths.PUBLISHED).unlink(missing_ok=True)
    try:
        return push_run(run_dir, repo).url
    except HubError as error:
        _failure_log(run_dir).write_text(f"{error}\n", encoding="utf-8")
        raise


def failure(run_dir: Path) -> str | None:
    """Why the last push did not go through."""
    path = _failure_log(run_dir)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _failure_log(run_dir: Path) -> Path:
    return paths.logs_dir(run_dir) / "push.log"
