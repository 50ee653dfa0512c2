"""What a harness is asked to do, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

HarnessApi = Literal["auto", "legacy", "v1"]
Phase = Literal["generate", "score", "both"]
"""`generate` leaves rows pending where scoring takes long, so that no GPU waits for it, `score` makes pending rows whole from
the journal, `both` does it at once. EvalPlus and lm-eval score later, and so do verifiers environments that say so."""


@dataclass(frozen=True, slots=True)
class HarnessJob:
    """One evaluation, as a harness sees it."""

    env_id: str
    env_args: Mapping[str, Any]
    base_url: str
    """The proxy's base, ending in `/v1`."""
    model: str
    sampling: Mapping[str, Any]
    """Parameters of an OpenAI chat request; what is no OpenAI parameter (`top_k`, `min_p`) stands in `extra_body`."""
    num_examples: int | None
    rollouts: int
    max_concurrent: int
    rollout_timeout_s: float
    done: frozenset[tuple[int, int]] = frozenset()
    """`(example_id, rollout)` that have a good row already and are not run again."""
    harness: str = "verifiers"
    phase: Phase = "both"
    scoring_args: tuple[str, ...] = ()
    """Keys of `env_args` that change scores alone; examples that repeat them in their `info` are the same examples."""
    scoring_workers: int | None = None
    """Sandboxes side by side; `None` is one a processor core."""
    api: HarnessApi = "auto"
    blocked_timeout_s: float = 300.0
    """Longest time that one rollout may keep all others from going on: environment code that never returns to the
    event loop. The adapter is then started again without it."""
    module_paths: tuple[Path, ...] = field(default=())
    """Folders with environment modules, searched after the environment's own packages and before ours."""


@dataclass(frozen=True, slots=True)
class HarnessStart:
    """What is about to run, known once the environment is loaded."""

    total_examples: int
    rollouts: int
    """Per example."""
    harness: Mapping[str, Any]
    """`name`, `version`, `api`."""
    environment: Mapping[str, Any]
    """`env_id`, `version`, `sha256` of its Python files."""
    data: Mapping[str, Any]
    """`examples` and `sha256` of all of them, digests of data files, and whatever the environment says itself."""


@dataclass(frozen=True, slots=True)
class HarnessReport:
    """How it went; the rows themselves went to `on_row`."""

    rows: int
    """Rows that this run produced, errors included."""
    errors: int
    """Rows among them that have an error and therefore no score; pending rows are none."""
    seconds: float
    restarts: int
    """Times that the adapter was started again because a rollout had blocked it."""
