"""`results.jsonl`: one finished rollout a line, appended while the run goes on, in order once it is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orjson

from modal_eval.records import Row
from modal_eval.results.files import json_line, write_whole

Key = tuple[int, int]
"""(example_id, rollout): what a row is the answer to."""


def row_key(row: Row) -> Key:
    return int(row["example_id"]), int(row.get("rollout", 0))


def is_scored(row: Row) -> bool:
    """Whether the row carries a reward; a fault of ours leaves it without one."""
    return row.get("reward") is not None


def is_generated(row: Row) -> bool:
    """Whether nothing is owed to the server any more: the row is scored, or only its scoring is still to come."""
    return is_scored(row) or bool(row.get("pending"))


def read_rows(path: Path) -> Iterator[Row]:
    """Every whole line. A torn line (the writer was killed) is skipped: its rollout is owed again."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict) and "example_id" in row:
                yield row


def latest_rows(rows: Iterable[Row]) -> dict[Key, Row]:
    """The last row of each key, except that a worse one (scored, pending, failed) never replaces a better one."""
    latest: dict[Key, Row] = {}
    for row in rows:
        key = row_key(row)
        if key not in latest or _completeness(row) >= _completeness(latest[key]):
            latest[key] = row
    return latest


def _completeness(row: Row) -> int:
    return is_generated(row) + is_scored(row)


def rewrite_in_order(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file by `rows` sorted by example and rollout, in one step."""
    write_whole(path, (json_line(row) for row in sorted(rows, key=row_key)))


class RowWriter:
    """Appends rows so that each is visible to readers at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._mend_torn_line(path)

    def _mend_torn_line(self, path: Path) -> None:
        """End a torn last line, so that the next row does not continue it."""
        if (size := path.stat().st_size) == 0:
            return
        with path.open("rb") as file:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                self._file.write(b"\n")

    def append(self, row: Row) -> None:
        self._file.write(json_line(row))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metric_names(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Numeric columns that the environment added, in order of appearance."""
    names: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if key not in ROW_FIELDS and isinstance(value, int | float) and not isinstance(value, bool):
                names[key] = None
    return list(names)


ROW_FIELDS = frozenset(
    {
        "example_id",
        "rollout",
        "prompt",
        "completion",
        "answer",
        "task",
        "reward",
        "generation_ms",
        "scoring_ms",
        "total_ms",
        "info",
        "has_error",
        "error",
        "finish_reason",
        "truncated",
        "empty",
        "usage",
        "num_turns",
        "stop_condition",
        "pending",
        "extracted",
    }
)
"""Keys of a row that are not metrics of the environment."""
