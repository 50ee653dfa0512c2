"""Run what is owed, each rollout by itself: bounded concurrency, a time limit, and one row whatever happens."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from modal_eval.harnesses.adapters.channel import Channel
from modal_eval.harnesses.adapters.common import CALLS, Backend, CallLog, Example, Job, Outcome, fault, row
from modal_eval.harnesses.adapters.stepping import CURRENT

logger = logging.getLogger("modal_eval.harness")

Result = TypeVar("Result", Outcome, list[Outcome])

HEARTBEAT_S = 1.0
PROGRESS_S = 5.0
CANCEL_GRACE_S = 5.0
"""Time that a cancelled rollout has to clean up before it is left behind."""


class Progress:
    """Counts for the log and the heartbeat; read by the heartbeat's thread."""

    def __init__(self, groups: int, total: int, finished: int) -> None:
        self.groups, self.total, self.finished = groups, total, finished
        self.rewards = self.scored = 0.0
        self.errors = 0
        self.in_flight: dict[tuple[int, int], float] = {}
        self._logged_at = 0.0

    def count(self, line: dict[str, Any]) -> None:
        self.finished += 1
        if line.get("pending"):
            pass
        elif line["error"] is None:
            self.rewards += line["reward"]
            self.scored += 1
        else:
            self.errors += 1
            error = line["error"]
            logger.error(
                "rollout %s/%s: %s fault: %s: %s",
                line["example_id"], line["rollout"], error["fault"], error["type"], error["message"],
            )  # fmt: skip
        self.log()

    def log(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._logged_at < PROGRESS_S and self.finished < self.total:
            return
        self._logged_at = time.monotonic()
        percent = 100 * self.finished // self.total if self.total else 100
        reward = f"{self.rewards / self.scored:.3f}" if self.scored else "?"
        logger.info(
            "Processing %d groups (%d total rollouts): %d%%|%s| %d/%d, reward=%s, errors=%d",
            self.groups, self.total, percent, ("#" * (percent // 10)).ljust(10), self.finished, self.total, reward,
            self.errors,
        )  # fmt: skip


class Heart:
    """Says every second, from a thread, that this process lives and what it is busy with."""

    def __init__(self, channel: Channel, progress: Progress) -> None:
        self._channel, self._progress = channel, progress
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            now = time.monotonic()
            running = sorted((now - since, *tag) for tag, since in list(self._progress.in_flight.items()))
            oldest = [[example_id, rollout, round(age, 1)] for age, example_id, rollout in running[-3:][::-1]]
            self._channel.send("heartbeat", in_flight=len(running), oldest=oldest)


class Driver:
    """Runs the owed rollouts of one job on one backend."""

    def __init__(self, job: Job, backend: Backend, channel: Channel) -> None:
        self.job, self.backend, self.channel = job, backend, channel
        self.examples: Sequence[Example] = backend.examples[: job.num_examples]
        owed_now = job.done & {(e.example_id, r) for e in self.examples for r in range(job.rollouts)}
        self.progress = Progress(len(self.examples), len(self.examples) * job.rollouts, len(owed_now))

    async def run(self) -> None:
        """Write one row for every rollout that is owed, in the order of the examples as far as they finish so."""
        self.progress.log(now=True)
        units = self._grouped_units() if self.backend.grouped else self._single_units()
        with Heart(self.channel, self.progress):
            side_by_side = self.job.max_concurrent // (self.job.rollouts if self.backend.grouped else 1)
            side_by_side *= 2 if self._ahead else 1
            workers = [asyncio.create_task(self._work(units)) for _ in range(max(1, side_by_side))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

    @property
    def _ahead(self) -> bool:
        """Whether half of the rollouts wait for a place at the proxy."""
        return self.backend.asks_ahead and self.job.phase == "generate"

    async def _work(self, units: Iterator[Callable[[], Awaitable[None]]]) -> None:
        for unit in units:
            await unit()

    def _single_units(self) -> Iterator[Callable[[], Awaitable[None]]]:
        for position, example in enumerate(self.examples):
            for rollout in range(self.job.rollouts):
                tag = (example.example_id, rollout)
                if tag in self.job.condemned:
                    self.write(example, rollout, Outcome(error=self.job.condemned[tag]))
                elif tag not in self.job.done:
                    yield lambda position=position, rollout=rollout: self._single(position, rollout)  # type: ignore[misc]

    def _grouped_units(self) -> Iterator[Callable[[], Awaitable[None]]]:
        for position, example in enumerate(self.examples):
            tags = [(example.example_id, rollout) for rollout in range(self.job.rollouts)]
            owed = [rollout for _, rollout in tags if (example.example_id, rollout) not in self.job.done]
            if error := next((self.job.condemned[tag] for tag in tags if tag in self.job.condemned), None):
                for rollout in owed:
                    self.write(example, rollout, Outcome(error=error))
            elif owed:
                yield lambda position=position: self._group(position)  # type: ignore[misc]

    async def _single(self, position: int, rollout: int) -> None:
        example, calls = self.examples[position], CallLog()
        CURRENT.set((example.example_id, rollout))
        CALLS.set(calls)
        result = await self._bounded(
            lambda: self.backend.run_one(position, rollout, calls), [(example.example_id, rollout)]
        )
        self.write(example, rollout, Outcome(error=result, calls=calls) if isinstance(result, dict) else result)

    async def _group(self, position: int) -> None:
        """All rollouts of one example; those that have a row already are generated again, from the journal."""
        example, rollouts = self.examples[position], list(range(self.job.rollouts))
        logs = [CallLog() for _ in rollouts]
        CURRENT.set((example.example_id, -1))
        outcomes = await self._bounded(
            lambda: self.backend.run_group(position, rollouts, logs),
            [(example.example_id, rollout) for rollout in rollouts],
        )
        for rollout, log in zip(rollouts, logs, strict=True):
            if (example.example_id, rollout) not in self.job.done:
                outcome = Outcome(error=outcomes, calls=log) if isinstance(outcomes, dict) else outcomes[rollout]
                self.write(example, rollout, outcome)

    async def _bounded(
        self, start: Callable[[], Coroutine[Any, Any, Result]], tags: Sequence[tuple[int, int]]
    ) -> Result | dict[str, str]:
        """The work's result, or the error of the time limit; a task that does not let itself be cancelled is left."""
        since = time.monotonic()
        self.progress.in_flight.update(dict.fromkeys(tags, since))
        task = asyncio.create_task(start())
        # One that waits at the proxy does so no longer than the one before it may take.
        limit = self.job.rollout_timeout_s * (2 if self._ahead else 1)
        try:
            finished, _ = await asyncio.wait({task}, timeout=limit)
            if finished:
                return task.result()
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
            where = "" if task.done() else ", and does not let itself be cancelled"
            asked = self.job.rollout_timeout_s
            message = f"not finished after eval.rollout_timeout={asked:g} s{where}; raise the limit or mend the example"
            return fault("timeout", message, "TimeoutError")
        except asyncio.CancelledError:
            task.cancel()
            raise
        except Exception as error:
            logger.exception("rollout %s", tags[0])
            return fault("environment", error)
        finally:
            for tag in tags:
                self.progress.in_flight.pop(tag, None)

    def write(self, example: Example, rollout: int, outcome: Outcome) -> None:
        """Hand one finished rollout to the host."""
        line = row(example, rollout, outcome)
        self.channel.send("row", row=line)
        self.progress.count(line)
