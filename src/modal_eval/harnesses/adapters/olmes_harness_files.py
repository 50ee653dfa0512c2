"""The files that OLMES leaves: `task-NNN-NAME-metrics.json`, `-predictions.jsonl` and `-requests.jsonl` for each task."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modal_eval.harnesses.adapters.common import OVERLONG_PHRASES, CallLog

METRICS = "-metrics.json"


@dataclass(frozen=True)
class Prediction:
    """One document of a task, answered and scored."""

    doc_id: Any
    native_id: Any
    prompt: Any
    text: str
    label: Any
    doc: Any
    metrics: dict[str, float]
    """OLMES's numbers for this document; texts and lists among its metrics are left out."""
    calls: CallLog = field(default_factory=CallLog)
    overlong: bool = False
    """The server refused a prompt that does not fit: the empty answer that OLMES scores is the model's failure."""
    failure: str | None = None
    """Any other error of a call. OLMES scores an empty answer for it as well, and that number is nobody's."""


@dataclass(frozen=True)
class TaskOutput:
    """One task of a run."""

    name: str
    primary_metric: str | None
    task_hash: str | None
    metrics: dict[str, Any]
    """Its scores as OLMES names them, with `primary_score`."""
    predictions: list[Prediction] = field(default_factory=list)


def read_output(folder: Path) -> list[TaskOutput]:
    """Every task in `folder`, in the order in which it ran."""
    return [read_task(path) for path in sorted(folder.glob(f"task-*{METRICS}"))]


def read_task(path: Path) -> TaskOutput:
    said = json.loads(path.read_text(encoding="utf-8"))
    stem = path.name.removesuffix(METRICS)
    config = said.get("task_config") or {}
    requests: dict[Any, dict[str, Any]] = {}
    for line in read_lines(path.with_name(f"{stem}-requests.jsonl")):
        requests.setdefault(line.get("doc_id"), line)
    predictions = [
        prediction_of(line, requests.get(line.get("doc_id"), {}))
        for line in read_lines(path.with_name(f"{stem}-predictions.jsonl"))
    ]
    # The task's full name (`gsm8k::olmes`) is its alias: `task_name` alone would name two variants alike.
    name = (config.get("metadata") or {}).get("alias") or said["task_name"]
    scores = {**(said.get("metrics") or {}), "num_instances": said.get("num_instances")}
    return TaskOutput(name, config.get("primary_metric"), said.get("task_hash"), scores, predictions)


def prediction_of(line: dict[str, Any], request: dict[str, Any]) -> Prediction:
    asked = request.get("request") or {}
    context = asked.get("context")
    outputs = line.get("model_output") or []
    # What the server said may be empty, so it is the key that counts.
    errors = [str(output["llm_error"]) for output in outputs if "llm_error" in output]
    failures = [error or "litellm did not say why the call failed" for error in errors if not is_overlong(error)]
    return Prediction(
        doc_id=line.get("doc_id"),
        native_id=line.get("native_id"),
        prompt=context.get("messages", context) if isinstance(context, dict) else context,
        text=text_of(outputs),
        label=line.get("label", request.get("label")),
        doc=request.get("doc"),
        metrics={
            name: number
            for name, value in (line.get("metrics") or {}).items()
            if (number := as_number(value)) is not None
        },
        calls=calls_of(outputs),
        overlong=len(failures) < len(errors),
        failure=failures[0] if failures else None,
    )


def is_overlong(error: str) -> bool:
    return any(phrase in error.lower() for phrase in OVERLONG_PHRASES)


def calls_of(outputs: list[dict[str, Any]]) -> CallLog:
    """What the server said, as litellm hands it on; of several samples the one that was cut off says why they ended."""
    log, reasons = CallLog(), []
    for output in outputs:
        if isinstance(response := output.get("llm_response"), dict):
            choices = response.get("choices") or [{}]
            log.record(choices[0].get("finish_reason"), SimpleNamespace(**(response.get("usage") or {})))
            reasons.append(log.finish_reason)
    if "length" in reasons:
        log.finish_reason = "length"
    return log


def text_of(outputs: list[dict[str, Any]]) -> str:
    """What the model said; of several choices by likelihood, nothing was said."""
    said = [output.get("continuation") for output in outputs]
    return str(said[0]) if said and said[0] is not None else ""


def as_number(value: Any) -> float | None:
    if isinstance(value, bool | int | float) and math.isfinite(value):
        return float(value)
    return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
