"""The live view: reads `checkpoint_meta.json`, so it shows any run, wherever its flow executes."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from modal_eval import paths
from modal_eval.cli.output import talk
from modal_eval.reports.tables import score_text
from modal_eval.results.files import read_json

POLL_S = 0.5
PLAIN_LINE_EVERY_S = 15.0

STAGES = {
    "environment": "making the harness's environment (once)",
    "prepare": "preparing the model and the benchmark",
    "replay": "finishing from the journal",
    "deploy": "starting the model server",
    "generate": "generating",
    "generated": "giving the server back",
    "score": "scoring",
    "report": "telling Prefect how it ended",
}


class LiveView:
    """Shows how far the run in `run_dir` is: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / paths.CHECKPOINT_META
        self._ended = threading.Event()
        self._outcome = "done"
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outcome = "done" if kind is None else "stopped"
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        if talk.is_terminal:
            self._draw()
        else:
            self._print_lines()

    def _draw(self) -> None:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=talk,
        )
        task = bar.add_task("starting", total=None, facts="")
        with Live(bar, console=talk, refresh_per_second=4, transient=False) as view:
            ended = False
            while not ended:
                ended = self._ended.wait(POLL_S)
                if meta := self._read():
                    view.update(shown(bar, "" if ended else str(meta.get("note") or "")))
                    bar.update(
                        task,
                        description=self._outcome if ended else stage_text(meta),
                        completed=meta.get("completed_rollouts", 0),
                        total=meta.get("total_rollouts"),
                        facts=facts_text(meta),
                    )

    def _print_lines(self) -> None:
        told, printed = ("", ""), 0.0
        while not self._ended.wait(POLL_S):
            meta = self._read()
            news = (str(meta.get("stage", "")), str(meta.get("note", "")))
            if meta and (news != told or time.monotonic() - printed >= PLAIN_LINE_EVERY_S):
                told, printed = news, time.monotonic()
                talk.print(plain_line(meta), soft_wrap=True, markup=True)

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self._path)
        except (OSError, json.JSONDecodeError):
            return {}
        return found if isinstance(found, dict) else {}


def shown(bar: Progress, note: str) -> RenderableType:
    """The bar, and below it what the stage is at, such as who holds the GPUs that it waits for."""
    return Group(bar, Text(note, "dim")) if note else bar


def stage_text(meta: dict[str, Any]) -> str:
    return STAGES.get(str(meta.get("stage")), str(meta.get("stage") or "starting"))


def facts_text(meta: dict[str, Any]) -> str:
    """Score so far with its error, tokens per second, what is unscored, and the time left."""
    calls = meta.get("calls") or {}
    parts = [f"score {score_text(meta.get('avg_reward'), meta.get('stderr'))}"]
    if speed := calls.get("tokens_per_s"):
        parts.append(f"{speed:.0f} tok/s")
    if unscored := meta.get("unscored_rollouts"):
        parts.append(f"[red]{unscored} unscored[/]")
    if calls.get("retries"):
        parts.append(f"{calls['retries']} retries")
    if left := meta.get("seconds_left"):
        parts.append(f"{duration(left)} left")
    return " · ".join(parts)


def plain_line(meta: dict[str, Any]) -> str:
    if note := meta.get("note"):
        return f"{stage_text(meta)}: {escape(str(note))}"
    if not meta.get("total_rollouts"):
        return stage_text(meta)
    return f"{stage_text(meta)}: {meta.get('completed_rollouts', 0)}/{meta['total_rollouts']} rollouts · {facts_text(meta)}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
