"""Asks processes that run math-verify, several at once: an answer that takes a minute keeps nobody else waiting."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

from modal_eval.harnesses.envkit import equivalence

LONGEST_ANSWER = 50_000
"""Characters. A longer "answer" is a model that never closed its brace."""
MOST_PROCESSES = 4
ATTEMPTS = 2


class CheckerError(Exception):
    """The process that compares answers died, and again; the answer is unscored."""


class Checker:
    """Compares answers in processes of its own, made when first needed and again when they have died."""

    def __init__(self, processes: int | None = None) -> None:
        self._count = processes or min(MOST_PROCESSES, max(2, os.cpu_count() or 1))
        self._free: asyncio.LifoQueue[asyncio.subprocess.Process | None] | None = None
        self._started: set[asyncio.subprocess.Process] = set()

    async def __call__(self, response: str, answer: str) -> bool:
        """Whether `response` is equivalent to `answer`. Raises `CheckerError` when it cannot be told."""
        response, answer = response.strip(), answer.strip()
        if not response or len(response) > LONGEST_ANSWER:
            return False
        if response == answer:
            return True
        for _ in range(ATTEMPTS):
            verdict = await self._ask(response, answer)
            if isinstance(verdict, bool):
                return verdict
            if verdict == -signal.SIGXCPU:
                return False
        raise CheckerError(
            f"math-verify's process ended with {verdict} on {answer[:80]!r} and {response[:80]!r}; the rollout is unscored, "
            "`modal-eval resume` tries again"
        )

    async def _ask(self, response: str, answer: str) -> bool | int:
        """The verdict, or the exit code of a process that died over it."""
        if self._free is None:
            self._free = asyncio.LifoQueue()  # the last one used first, so that no more are started than needed
            for _ in range(self._count):
                self._free.put_nowait(None)
        process = await self._free.get()
        returned = None
        try:
            process = process or await self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([response, answer]).encode() + b"\n")
            line = await process.stdout.readline()
            if line.endswith(b"\n"):
                returned = process
                return bool(json.loads(line))
            self._started.discard(process)
            return await process.wait()
        finally:
            if returned is None and process is not None:
                # Cancelled in the middle: its next line would be the answer to this question.
                _kill(process)
            self._free.put_nowait(returned)

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", equivalence.__file__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self._started.add(process)
        return process

    async def close(self) -> None:
        """End the processes."""
        for process in self._started:
            _kill(process)
            await process.wait()
        self._started.clear()
        self._free = None


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
