"""Where words go: data on stdout, talk on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

talk = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""Without markup: names of models, kinds and folders may hold brackets."""
data = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)
"""Wide where no terminal limits it: a table in a pipe is cut by whoever reads it, not by us."""


def complain(message: str) -> None:
    """One line on stderr that says what happened and what to do."""
    print(f"modal-eval: {message}", file=sys.stderr)  # noqa: T201 - rich would wrap and mark up a line to be searched for


def shown(path: Path | str) -> str:
    """A path as short as it can be typed from here: relative below the working directory, else absolute."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def print_json(value: Any) -> None:
    """Machine-readable output, alone on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
