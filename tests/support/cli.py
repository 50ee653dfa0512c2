"""The command line as a user runs it: a process of its own, with folders of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support.processes import Mark

FIXTURES = Path(__file__).parents[1] / "fixtures" / "environments"
TIMES = ("generation_ms", "scoring_ms", "total_ms")
TIMEOUT_S = 480.0


class Cli:
    """Runs `modal-eval` against one output folder; everything it starts carries the test's mark."""

    def __init__(self, folder: Path, mark: Mark, prefect_api: str) -> None:
        self.folder = folder
        self.mark = mark
        self.run_dir = folder / "run"
        self.env = {
            **mark.env,
            "MODAL_EVAL_OUTPUT_DIR": str(folder / "outputs"),
            "MODAL_EVAL_STATE_DIR": str(folder / "state"),
            "MODAL_EVAL_CACHE_DIR": str(folder / "cache"),
            "PREFECT_API_URL": prefect_api,
            "PREFECT_HOME": str(folder / "prefect"),
            "COLUMNS": "200",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "modal_eval.cli", *arguments],
            env=self.env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def __call__(
        self, *arguments: str, expect: int | None = 0, timeout: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; the exit code has to be `expect`."""
        return finished(self.start(*arguments), expect, timeout)

    def benchmark(self, **settings: Any) -> str:
        """A benchmark file of coin tosses; returns its path."""
        path = self.folder / "coins.yaml"
        config = {"env_id": "coin-env", "eval": {"module_paths": [str(FIXTURES)], "max_concurrent": 8}, **settings}
        path.write_text(json.dumps(config))  # JSON is YAML
        return str(path)

    def arguments(self, base_url: str, *more: str, benchmark: str | None = None) -> list[str]:
        return [
            "-m", "stub", "-b", benchmark or self.benchmark(), "--run-dir", str(self.run_dir), f"--infra.base_url={base_url}",
            *more,
        ]  # fmt: skip

    def rows(self, run_dir: Path | None = None) -> list[dict[str, Any]]:
        lines = ((run_dir or self.run_dir) / "results.jsonl").read_text().splitlines()
        return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]

    def metadata(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "metadata.json").read_text())

    def wait_for(self, condition: Callable[[], bool], process: subprocess.Popen[str], within: float = 120.0) -> None:
        """Return once `condition` holds, or the process has ended."""
        deadline = time.monotonic() + within
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline, "it did not come so far in time"
            time.sleep(0.02)

    def in_transit(self, server: Any) -> set[str]:
        """Tags of the answers that a kill caught between the server, which calls them finished, and our disk.

        They were in flight, and a resume may ask for them again; everything else that the server finished is paid for.
        """
        deadline = time.monotonic() + 60
        while server.stats()["in_flight"]:
            assert time.monotonic() < deadline, "calls of a killed run are still in flight"
            time.sleep(0.02)
        finished_by_server: Counter[str] = Counter()
        for key, count in server.stats()["finished"].items():
            finished_by_server[key.partition(":")[0]] += count
        journaled: Counter[str] = Counter()
        for line in (self.run_dir / "checkpoint.jsonl").read_bytes().splitlines()[1:]:
            with contextlib.suppress(ValueError):
                journaled[json.loads(line).get("tag", "")] += 1
        return {tag for tag, count in finished_by_server.items() if count > journaled[tag]}

    def process_of(self, needle: str) -> int:
        """The pid of the marked process whose command line holds `needle`, not its guardian's."""
        found = [pid for pid, line in self.mark.processes().items() if needle in line and "guardian.py" not in line]
        assert len(found) == 1, f"{needle}: {self.mark.processes()}"
        return found[0]


def finished(
    process: subprocess.Popen[str], expect: int | None, timeout: float = TIMEOUT_S
) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it did not end in time:\n{out}\n{err}") from None
    if expect is not None:
        assert process.returncode == expect, f"exit {process.returncode}, not {expect}:\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def repeated(server: Any) -> set[str]:
    """Tags of what the server was asked for again after it had finished it."""
    return {key.partition(":")[0] for key in server.stats()["repeated_after_finish"]}


def kill(process: subprocess.Popen[str]) -> None:
    """`kill -9` of the command alone; what it had started has to end by itself."""
    process.kill()
    process.communicate()


def prefect_server(folder: Path) -> Iterator[str]:
    """A real Prefect server on a database of its own, for a session."""
    from modal_eval.cli.prefect_server import embedded_server

    os.environ["PREFECT_HOME"] = str(folder)
    with embedded_server(folder / "prefect.log") as api_url:
        yield api_url
