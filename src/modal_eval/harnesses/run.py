"""Run a harness job: start the adapter, hand its rows on, and take a rollout out that stops all the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modal_eval.errors import HarnessError
from modal_eval.harnesses.adapter_process import AdapterProcess
from modal_eval.harnesses.adapters.stepping import Tag
from modal_eval.harnesses.job import HarnessJob, HarnessReport, HarnessStart
from modal_eval.records import Row

Results = dict[str, Any]
"""A harness's own numbers, as it names them; no other harness has the same ones."""
POLL_S = 0.4
MAX_RESTARTS = 100
"""More rollouts than this that block the adapter are no single bad examples any more."""


def run_harness(
    job: HarnessJob,
    *,
    run_dir: Path,
    python: Path,
    on_row: Callable[[Row], None],
    on_start: Callable[[HarnessStart], None],
    should_stop: Callable[[], str | None],
    on_results: Callable[[Results], None] | None = None,
) -> HarnessReport:
    """Run everything that `job` owes; `on_row` has every finished rollout before the next one is asked for.

    `on_results` has what the harness itself makes of all scores together, where it makes anything of them.
    `should_stop` is asked twice a second and gives a reason when going on is pointless, because the server or the
    proxy died. Raises `HarnessError` then, when the environment cannot be loaded, and when the adapter dies. The rows
    handed on until then are good: run again with them in `job.done`.
    """
    run = _Run(job, run_dir, python, on_row, on_start, should_stop)
    run.on_results = on_results or _no_results
    return run.to_the_end()


def describe(job: HarnessJob, run_dir: Path, python: Path) -> HarnessStart:
    """Load the environment and say what would run, without running it. Raises `HarnessError` when it cannot be loaded."""
    starts: list[HarnessStart] = []
    run = _Run(job, run_dir, python, on_row=_no_row, on_start=starts.append, should_stop=lambda: None)
    run.describe_only = True
    run.to_the_end()
    return starts[0]


def _no_row(row: Row) -> None:
    raise HarnessError(f"the harness ran example {row['example_id']} although it was only asked to describe itself")


def _no_results(results: Results) -> None:
    """The caller does not want them."""


class _Blocked(Exception):  # noqa: N818 - an outcome, not an error
    """One rollout's code keeps the adapter busy and nothing else can go on."""

    def __init__(self, tag: Tag, seconds: float) -> None:
        super().__init__(tag, seconds)
        self.tag, self.seconds = tag, seconds


class _Run:
    """The state of one `run_harness`: what is done, and which rollouts are not to be run again."""

    def __init__(
        self,
        job: HarnessJob,
        run_dir: Path,
        python: Path,
        on_row: Callable[[Row], None],
        on_start: Callable[[HarnessStart], None],
        should_stop: Callable[[], str | None],
    ) -> None:
        self._job, self._run_dir, self._python = job, run_dir, python
        self._on_row, self._on_start, self._should_stop = on_row, on_start, should_stop
        self._done = set(job.done)
        self._condemned: dict[Tag, dict[str, str]] = {}
        self._rows = self._errors = self._restarts = 0
        self.describe_only = False
        self.on_results: Callable[[Results], None] = _no_results
        self._started = False
        self._ended = False
        self._looked_at = 0.0
        self._oldest: list[list[float]] = []

    def to_the_end(self) -> HarnessReport:
        began = time.monotonic()
        while True:
            try:
                self._one_adapter()
            except _Blocked as blocked:
                self._condemn(blocked)
            else:
                seconds = time.monotonic() - began
                return HarnessReport(self._rows, self._errors, seconds, self._restarts)

    def _one_adapter(self) -> None:
        with AdapterProcess(self._python, self._job_line(), self._run_dir) as adapter:
            while not self._ended:
                if (event := adapter.next_event(POLL_S)) is not None:
                    self._take(event, adapter)
                elif adapter.is_over():
                    raise self._death(adapter)
                self._look_after(adapter)

    def _death(self, adapter: AdapterProcess) -> HarnessError:
        """What is said of an adapter that is over although it never came to its end."""
        busy = "; ".join(f"example {e:g} rollout {r:g} for {age:g} s" for e, r, age in self._oldest)
        return HarnessError(
            f"the harness {adapter.describe_exit()} after {self._rows} rows"
            + (f", longest in flight: {busy}" if busy else "")
            + f"; nothing that was generated is lost, resume the run. Its last words ({adapter.log_path}):\n"
            + adapter.log_tail()
        )

    def _take(self, event: dict[str, Any], adapter: AdapterProcess) -> None:
        match event["event"]:
            case "row":
                row: Row = event["row"]
                self._rows += 1
                self._errors += row["error"] is not None
                self._done.add((row["example_id"], row["rollout"]))
                self._on_row(row)
            case "start":
                if not self._started:
                    self._started = True
                    self._on_start(HarnessStart(**{k: v for k, v in event.items() if k != "event"}))
            case "results":
                self.on_results(event["results"])
            case "heartbeat":
                self._oldest = event["oldest"]
            case "error":
                raise HarnessError(f"{event['message']} (log: {adapter.log_path})")
            case "end":
                self._ended = True

    def _look_after(self, adapter: AdapterProcess) -> None:
        if time.monotonic() - self._looked_at < POLL_S:
            return
        self._looked_at = time.monotonic()
        if (reason := self._should_stop()) is not None and not self._ended:
            raise HarnessError(f"the harness was stopped after {self._rows} rows: {reason}")
        limit = min(self._job.blocked_timeout_s, self._job.rollout_timeout_s)
        if (step := adapter.blocked_for()) is not None and step[1] > limit:
            adapter.kill()
            raise _Blocked(*step)

    def _condemn(self, blocked: _Blocked) -> None:
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise HarnessError(
                f"{self._restarts} rollouts blocked the harness for more than {blocked.seconds:.0f} s each; the "
                f"environment {self._job.env_id!r} needs mending: its code must return to the event loop"
            )
        example_id, rollout = blocked.tag
        message = (
            f"the environment's code did not return for {blocked.seconds:.0f} s and kept every other rollout from going "
            "on; the harness was started again without this one"
        )
        error = {"type": "TimeoutError", "message": message, "fault": "timeout"}
        for each in range(self._job.rollouts) if rollout < 0 else [rollout]:
            if (example_id, each) not in self._done:
                self._condemned[(example_id, each)] = error

    def _job_line(self) -> dict[str, Any]:
        line = asdict(self._job)
        del line["blocked_timeout_s"]
        return {
            **line,
            "describe_only": self.describe_only,
            "module_paths": [str(path) for path in self._job.module_paths],
            "done": sorted(self._done),
            "condemned": [[*tag, error] for tag, error in sorted(self._condemned.items())],
        }
