"""The file of a batch: a list of checkpoints, each with the name that its row gets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from modal_eval.config.load import checked
from modal_eval.config.models import Section
from modal_eval.errors import ConfigError


class Job(Section):
    """One checkpoint of a batch."""

    checkpoint_path: Annotated[str, Field(min_length=1)]
    """Folder, Hub id or s3://… address."""
    output_name: Annotated[str, Field(min_length=1)]
    """What its row of the table is called, such as `exp1_step100`."""

    @property
    def slug(self) -> str:
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.output_name).strip("-.") or "job"


def load_jobs(path: Path) -> list[Job]:
    """Read a list of `{"checkpoint_path": …, "output_name": …}`. Raises `ConfigError` that names the wrong entry."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f'{path} holds no list of jobs; write [{{"checkpoint_path": "/path/to/checkpoint", "output_name": "exp1_step100"}}]'
        )
    jobs = [
        checked(Job, entry if isinstance(entry, dict) else {}, where=f"{path}, job {number}")
        for number, entry in enumerate(entries, 1)
    ]
    slugs = [job.slug for job in jobs]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise ConfigError(
            f"{path}: output_name {', '.join(twice)} stands there twice; each row needs a name of its own"
        )
    return jobs
