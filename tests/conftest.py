"""Fixtures that any test may ask for; each ends what it has started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli, prefect_server
from tests.support.processes import Mark
from tests.support.upstream import Upstream, upstream


@pytest.fixture(name="upstream")
def healthy_upstream() -> Iterator[Upstream]:
    """A scripted upstream that answers at once; `upstream.script(...)` makes it misbehave."""
    with upstream() as server:
        yield server


@pytest.fixture
def mark() -> Iterator[Mark]:
    """Marks the processes of a test, and fails the test that leaves one of them behind."""
    made = Mark()
    yield made
    assert made.wait_until_gone() == {}


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real Prefect server that this session shares."""
    yield from prefect_server(tmp_path_factory.mktemp("prefect"))


@pytest.fixture
def cli(tmp_path: Path, mark: Mark, prefect_api: str) -> Cli:
    """`modal-eval` with folders of its own; the test fails if it leaves a process behind."""
    return Cli(tmp_path, mark, prefect_api)
