"""Which rollout is running Python code at this moment, for somebody outside the process.

Environment code that never returns to the event loop (a loop in a reward function, a regular expression that
backtracks for ever and holds the interpreter's lock while it does) stops every rollout, and no thread of the process
can be trusted to say so. So the event loop's tasks write their rollout into a page of shared memory before each step
and clear it after; the host reads the page and sees one step that does not end.
"""

from __future__ import annotations

import asyncio
import mmap
import struct
import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar
from typing import Any

Tag = tuple[int, int]
"""`(example_id, rollout)`; rollout -1 is the example's scoring as a group."""

CURRENT: ContextVar[Tag | None] = ContextVar("modal_eval_rollout", default=None)
"""The rollout that the running task works for; tasks inherit it from the task that made them."""

LAYOUT = struct.Struct("=qqd")
PAGE = mmap.PAGESIZE


class StepPage:
    """The shared page: example, rollout, start of the step in monotonic seconds (0 when no step runs)."""

    def __init__(self, descriptor: int) -> None:
        self._page = mmap.mmap(descriptor, PAGE)

    def enter(self, tag: Tag) -> None:
        LAYOUT.pack_into(self._page, 0, tag[0], tag[1], time.monotonic())

    def leave(self) -> None:
        LAYOUT.pack_into(self._page, 0, 0, 0, 0.0)

    def read(self) -> tuple[Tag, float] | None:
        example_id, rollout, started = LAYOUT.unpack_from(self._page, 0)
        return ((example_id, rollout), started) if started else None


class MarkedCoroutine(Coroutine[Any, Any, Any]):
    """A task's coroutine that says on the page when it runs; in all else it is the coroutine itself."""

    def __init__(self, inner: Coroutine[Any, Any, Any], page: StepPage, tag: Tag) -> None:
        self._inner, self._page, self._tag = inner, page, tag

    def send(self, value: Any) -> Any:
        self._page.enter(self._tag)
        try:
            return self._inner.send(value)
        finally:
            self._page.leave()

    def throw(self, *error: Any) -> Any:
        self._page.enter(self._tag)
        try:
            return self._inner.throw(*error)
        finally:
            self._page.leave()

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._inner.__await__()

    def __getattr__(self, name: str) -> Any:
        # anyio asks a task's coroutine for cr_running and its like
        return getattr(self._inner, name)


def marking_task_factory(page: StepPage) -> Callable[..., asyncio.Task[Any]]:
    """A task factory for `loop.set_task_factory`: tasks made on behalf of a rollout mark their steps."""

    def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        context = options.get("context")
        tag = CURRENT.get() if context is None else context.get(CURRENT)
        if tag is not None:
            coro = MarkedCoroutine(coro, page, tag)
        return asyncio.Task(coro, loop=loop, **options)

    return make
