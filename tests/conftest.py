"""Fixtures that any test may ask for; each ends what it has started."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli, prefect_server
from tests.support.gpus import Machine, sleeper
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


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Eight GPUs of which only the driver is a stand-in, for processes that are given `machine.env(...)`."""
    folder = tmp_path / "machine"
    folder.mkdir()
    return Machine(folder)


@pytest.fixture
def this_machine(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The same GPUs, which this process sees too, by NVML and by `nvidia-smi`."""
    machine.enter(monkeypatch)
    return machine


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process of no consequence."""
    running = sleeper()
    yield running
    running.kill()
    running.wait()
