"""Reads a benchmark's rows, from the Hub at a pinned revision or from files, and says exactly what was read."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
DataFiles = str | Sequence[str] | None
Keep = Callable[[Row], bool]


@dataclass(frozen=True, slots=True)
class HubData:
    """Where a benchmark's rows stand on the Hub."""

    repository: str
    revision: str
    """The commit that the scores in the documentation were made with; `revision=` of the environment changes it."""
    split: str = "test"
    subsets: tuple[str | None, ...] = (None,)
    """Configurations of the data set, read one after the other."""
    files: tuple[str, ...] = ()
    """JSON-lines files of the repository, for a data set that comes with a loading script."""
    columns: tuple[str, ...] = ()
    """What every row has to have, `a|b` for a column with two names."""


@dataclass(frozen=True, slots=True)
class Data:
    """Rows and their origin. `source` goes into the run's identity, so it names no folder of this machine."""

    rows: list[Row]
    source: dict[str, Any]


def load_data(hub: HubData, revision: str | None, data_files: DataFiles, keep: Keep | None = None) -> Data:
    """Rows of `data_files` if given, else of the Hub at `revision` (the pinned one unless told otherwise).

    Rows that `keep` refuses are dropped while reading: LiveCodeBench's files are gigabytes, its window a part of them.
    """
    if data_files:
        return read_files(data_files, keep, hub.columns)
    try:
        return read_hub(hub, revision or hub.revision, keep)
    except Exception as error:
        raise RuntimeError(
            f"{hub.repository} at {revision or hub.revision} cannot be read from the Hub: {type(error).__name__}: {error}; "
            "check the network, HF_TOKEN and HF_ENDPOINT, or give local files with --env.data_files=FILE"
        ) from error


def read_hub(hub: HubData, revision: str, keep: Keep | None = None) -> Data:
    """Rows of the Hub. A branch or tag is resolved to its commit first: `main` names no data."""
    import datasets

    commit = resolve_revision(hub.repository, revision)
    rows: list[Row] = []
    if hub.files:
        from huggingface_hub import hf_hub_download

        for name in hub.files:
            path = hf_hub_download(hub.repository, name, repo_type="dataset", revision=commit)
            rows += filter(keep, read_rows(Path(path)))
    else:
        for subset in hub.subsets:
            rows += filter(keep, datasets.load_dataset(hub.repository, subset, split=hub.split, revision=commit))
    return Data(rows, {"source": "hub", "path": hub.repository, "revision": commit, "rows": len(rows)})


def resolve_revision(repository: str, revision: str) -> str:
    """The commit that `revision` stands for."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(repository, revision=revision).sha
    if commit is None:
        raise ValueError(f"the Hub names no commit for revision {revision!r} of {repository}; give a commit instead")
    return commit


def read_files(data_files: DataFiles, keep: Keep | None = None, columns: Sequence[str] = ()) -> Data:
    """Rows of one or more `.jsonl`, `.jsonl.gz` or `.json` files, in the order given; each has to have `columns`."""
    paths = [Path(each).expanduser() for each in ([data_files] if isinstance(data_files, str) else data_files or [])]
    digest = hashlib.sha256()
    rows: list[Row] = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"data_files={path} is no file; name an existing .jsonl, .jsonl.gz or .json file")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        rows += filter(keep, checked_rows(path, columns))
    if not rows:
        raise ValueError(
            f"data_files={data_files} holds no rows that are wanted; check the file and the environment's filters"
        )
    names = ",".join(path.name for path in paths)
    return Data(rows, {"source": "file", "path": names, "sha256": digest.hexdigest(), "rows": len(rows)})


def checked_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of one file; the first that is no row of this benchmark is named with what it lacks."""
    number = 0
    try:
        for number, row in enumerate(read_rows(path), start=1):
            if not isinstance(row, dict):
                raise ValueError(f"{path.name} row {number} is {json.dumps(row)[:60]}, not an object with columns")  # noqa: TRY004
            missing = [column for column in columns if not any(name in row for name in column.split("|"))]
            if missing:
                raise ValueError(
                    f"{path.name} row {number} has no {', '.join(missing)}, only {', '.join(sorted(row))[:200]}; give a "
                    f"file whose rows have {', '.join(columns)}"
                )
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path.name} ends or breaks after row {number}: {error}; a .gz file has to be complete, fetch it again"
        ) from error


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of one file, a line at a time where it has lines; a broken line is named."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if path.name.removesuffix(".gz").endswith(".json"):
            try:
                rows = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path.name} is no JSON: {error}; a file of JSON lines is called .jsonl") from error
            if not isinstance(rows, list):
                raise ValueError(f"{path.name} holds a {type(rows).__name__}, not a list of rows")
            yield from rows
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path.name} line {number} is no JSON: {error}; repair or remove it") from error
                yield row


def first_key(row: Row, *names: str) -> Any:
    """The value of the first of `names` that the row has: sources call one thing by several names."""
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(f"a row has none of {', '.join(names)}; it has {', '.join(sorted(row))}")


def make_dataset(data: Data, convert: Callable[[Row], Row]) -> Any:
    """The `datasets.Dataset` that verifiers wants: one converted row each. Raises `ValueError` for one that does not fit."""
    import datasets

    converted = []
    for number, row in enumerate(data.rows, start=1):
        try:
            converted.append(convert(row))
        except Exception as error:  # noqa: BLE001 - whatever a strange row makes of it is told
            raise ValueError(
                f"{data.source.get('path')} row {number} does not fit this benchmark: {type(error).__name__}: {error}"
            ) from None
    return datasets.Dataset.from_list(converted)
