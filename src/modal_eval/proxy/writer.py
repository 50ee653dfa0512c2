"""Group commit: many calls finish at once, one flush makes them all durable."""

from __future__ import annotations

import asyncio
import queue
import threading

from modal_eval.errors import JournalError
from modal_eval.proxy.journal import Journal
from modal_eval.proxy.keys import CallKey

MAX_GROUP = 4096

Waiting = tuple[CallKey, bytes, "asyncio.Future[None]"]


class GroupWriter:
    """Writes what the event loop hands over on a thread of its own, in the order in which it was handed over.

    What one turn of the loop has finished is handed over as one, since each hand-over may cost the loop its turn at the
    interpreter. While one group is flushed the next one gathers, so the slower the disk, the larger the groups.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._queue: queue.SimpleQueue[list[Waiting] | None] = queue.SimpleQueue()
        self._gathered: list[Waiting] = []
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    async def append(self, key: CallKey, line: bytes) -> None:
        """Return once the line is on disk. Raises `JournalError` when it cannot be written."""
        done: asyncio.Future[None] = self._loop.create_future()
        if not self._gathered:
            self._loop.call_soon(self._hand_over)
        self._gathered.append((key, line, done))
        await done

    def _hand_over(self) -> None:
        if self._gathered:
            self._queue.put(self._gathered)
            self._gathered = []

    def _run(self) -> None:
        ended = False
        while not ended and (group := self._queue.get()) is not None:
            while len(group) < MAX_GROUP and not self._queue.empty():
                more = self._queue.get()
                if more is None:
                    ended = True
                    break
                group += more
            failures = self._journal.commit([(key, line) for key, line, _ in group])
            self._loop.call_soon_threadsafe(resolve, group, failures)

    async def close(self) -> None:
        """Write what was handed over and end the thread."""
        self._hand_over()
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)


def resolve(group: list[Waiting], failures: list[JournalError | None]) -> None:
    for (_, _, done), failure in zip(group, failures, strict=True):
        if done.done():  # its call was cancelled
            continue
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)
