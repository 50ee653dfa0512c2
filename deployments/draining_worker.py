"""A process worker whose flows come to an end of their own: when it is stopped, drained, killed, or without its server.

Prefect's own kills its flows when it is stopped, runs no `finally` and no hook of theirs, and leaves them Running for
ever; killed itself, it leaves them to run on unseen; and it gives up after a few minutes without a server, which ends
them too. Pools are Prefect's own, of type `process`.

    SIGTERM, SIGINT   takes nothing more; asks each flow to end (SIGTERM), which gives its servers back and says that it
                      crashed; waits for that, at most `grace_s`
    SIGUSR1           drains: takes nothing more, waits until all flows are done, ends with 0
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import anyio.abc
import anyio.to_thread
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_WORKER_QUERY_SECONDS
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from modal_eval import orphans, serving
from modal_eval.processes import kill_group, start_ticks

LONGEST_PAUSE = 6
"""Between two questions to a server that does not answer, in units of the usual one: a minute for one of 10 s."""
POLL_S = 0.1
SWEEP_S = 600.0
"""The `janitor` of the schedule sees one machine; each worker looks after its own."""
AFTER_KILL_S = 15.0
"""For Prefect to notice the end of a flow that had to be killed, and to say so."""

warnings.filterwarnings(
    "ignore", message=".*matches existing registered type 'ProcessWorker'"
)  # it takes the same pools


class DrainingWorker(ProcessWorker):
    """See the head of this file."""

    grace_s: float = 120.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._flows: dict[UUID, int] = {}
        """Flow runs whose process has been started: its pid."""
        self._at_work = 0
        """Flow runs that are being started or run."""
        self._taking = True
        self._orphans: subprocess.Popen[str] | None = None

    async def start(
        self, run_once: bool = False, with_healthcheck: bool = False, printer: Callable[..., None] = print
    ) -> None:
        """Work until a signal says otherwise."""
        if run_once or with_healthcheck:
            raise NotImplementedError("this worker serves until a signal ends it, and has no health check")
        command = [sys.executable, "-I", str(Path(orphans.__file__)), str(self.grace_s)]
        self._orphans = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)  # noqa: ASYNC220 - once, before anything runs
        try:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) as signals:
                async with self, anyio.create_task_group() as loops:
                    loops.start_soon(self._again, self.get_and_submit_flow_runs, PREFECT_WORKER_QUERY_SECONDS.value())
                    loops.start_soon(self._again, self._sync_and_initialize, self.heartbeat_interval_seconds)
                    self._started_event = await self._emit_worker_started_event()
                    self._tell(f"serves {self._work_pool_name}")
                    loops.start_soon(self._again, self._sweep, SWEEP_S)
                    await self._until_ended(signals)
                    loops.cancel_scope.cancel()
        finally:
            self._say("bye")
            self._orphans.stdin.close()
            self._orphans.wait()
        self._tell("has ended")

    def _tell(self, what: str) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more, and flows are to be ended all the same
            print(f"worker {self.name} {what}", flush=True)  # noqa: T201 - for its journal

    async def _again(self, work: Callable[[], Awaitable[Any]], every_s: float) -> None:
        """Do `work` for ever: a server that is away for an hour finds its worker when it is back."""
        failures = 0
        while True:
            try:
                await work()
                failures = 0
            except Exception as error:  # noqa: BLE001 - whatever it is, flows are running
                failures += 1
                if failures == 1:
                    self._logger.warning("the server does not answer (%s: %s); trying on", type(error).__name__, error)
            pause = every_s * min(2**failures, LONGEST_PAUSE)
            await anyio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - so that workers do not ask all at once

    async def _sweep(self) -> None:
        """End the servers of this machine that nobody has a right to any more, as a run does before it starts one.

        A worker that is stopped meanwhile ends after it, so that nothing is ended and not told.
        """
        cleaned = await anyio.to_thread.run_sync(lambda: serving.clean(modal=False))
        for deed in cleaned.deeds:
            self._tell(f"sweeps: {deed}")
        for fault in cleaned.faults:
            self._logger.error("%s", fault)

    async def get_and_submit_flow_runs(self) -> Any:
        return await super().get_and_submit_flow_runs() if self._taking else []

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> ProcessWorkerResult:
        worker = self
        ticks = 0.0

        class Status:
            def started(self, pid: int) -> None:
                nonlocal ticks
                ticks = start_ticks(pid)
                worker._flows[flow_run.id] = pid
                worker._say(f"+ {pid} {ticks}")
                if task_status is not None:
                    task_status.started(pid)

        self._at_work += 1
        try:
            return await super().run(flow_run, configuration, Status())
        finally:
            self._at_work -= 1
            if pid := self._flows.pop(flow_run.id, None):
                self._say(f"- {pid}")

    def _say(self, line: str) -> None:
        """Tell the process that outlives us; without it there is one guard less."""
        try:
            self._orphans.stdin.write(f"{line}\n")
            self._orphans.stdin.flush()
        except OSError:
            self._logger.warning("the process that looks after orphans is gone")

    async def _until_ended(self, signals: Any) -> None:
        async with anyio.create_task_group() as waiting:

            async def until_drained() -> None:
                await self._until(lambda: not (self._taking or self._at_work or self._submitting_flow_run_ids))
                waiting.cancel_scope.cancel()

            waiting.start_soon(until_drained)
            async for number in signals:
                if self._taking:
                    self._tell(f"takes nothing more; {self._at_work} runs to end")
                self._taking = False
                if number != signal.SIGUSR1:
                    break
            await self._end_flows()
            waiting.cancel_scope.cancel()

    async def _end_flows(self) -> None:
        """Ask every flow to end, also those that are just being started, and see to it."""
        asked: set[int] = set()
        with anyio.move_on_after(self.grace_s):
            while self._at_work or self._submitting_flow_run_ids:
                for pid in set(self._flows.values()) - asked:
                    asked.add(pid)
                    _send(pid, signal.SIGTERM)
                await anyio.sleep(POLL_S)
            return
        for pid in list(self._flows.values()):
            self._tell(f"kills flow process {pid}: it did not end in {self.grace_s:g} s")
            await anyio.to_thread.run_sync(kill_group, pid, start_ticks(pid), 0.0)
        with anyio.move_on_after(AFTER_KILL_S):
            await self._until(lambda: not self._at_work)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110 - Prefect's part of it sets no event
            await anyio.sleep(POLL_S)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
