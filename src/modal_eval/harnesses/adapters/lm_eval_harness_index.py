"""lm-eval's list of its tasks, kept from one process to the next: reading its 14,000 YAML files takes seconds each time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

logger = logging.getLogger("modal_eval.harness")


def task_manager(folders: list[str]) -> Any:
    """lm-eval's `TaskManager` over its own tasks and over those in `folders`, which come first."""
    manager = remembered_defaults()
    if folders:
        own = TaskManager(include_path=folders, include_defaults=False)
        manager._index = {**manager._index, **own._index}
        manager._all_tasks = sorted(manager._index)
    return manager


def remembered_defaults() -> Any:
    """The manager of lm-eval's own tasks, read from this environment's folder where it stands there already.

    The file belongs to whoever made the environment, like its packages. Where it cannot be read or written, the YAML files
    are read again.
    """
    path = Path(sys.prefix) / f".modal-eval-tasks-{release()}.pickle"
    try:
        return pickle.loads(path.read_bytes())  # noqa: S301 - as trusted as the packages beside it
    except FileNotFoundError:
        pass
    except Exception as error:  # noqa: BLE001 - a cut off pickle raises whatever its bytes happen to spell
        logger.warning("%s cannot be read (%s: %s); lm-eval's tasks are read anew", path, type(error).__name__, error)
    manager = TaskManager()
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        partial.write_bytes(pickle.dumps(manager))
        partial.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the next run reads lm-eval's tasks anew", path, error.strerror)
    return manager


def release() -> str:
    """Version of lm-eval and its place: the list holds absolute paths."""
    version = importlib.metadata.version("lm_eval")
    place = hashlib.sha256(f"{sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    return f"{version}-{place}"
