"""Where requests meet answers: from the journal, from a call that is already on its way, or from upstream."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from modal_eval.errors import JournalError
from modal_eval.proxy import lines
from modal_eval.proxy.accounting import Accounting
from modal_eval.proxy.calls import Call, Caller
from modal_eval.proxy.faults import CallError, Fault
from modal_eval.proxy.journal import Journal
from modal_eval.proxy.keys import CallKey, Claim, Occurrences, Request
from modal_eval.proxy.lines import Answer
from modal_eval.proxy.replies import judge
from modal_eval.proxy.settings import ProxySettings
from modal_eval.proxy.transport import Transport
from modal_eval.proxy.upstreams import Upstreams
from modal_eval.proxy.writer import GroupWriter

logger = logging.getLogger(__name__)

MODELS = CallKey("", "0" * 64, 0)
"""Under this key the journal remembers what `GET /v1/models` said, for replays."""
MODELS_TIMEOUT_S = 30.0
HEARING_S = 0.002


@dataclass(frozen=True, slots=True)
class Served:
    """An answer and where it came from."""

    answer: Answer
    source: Literal["journal", "upstream"]


class Desk:
    """Owns the calls of one proxy. Made and closed inside the event loop that serves."""

    def __init__(self, settings: ProxySettings, journal: Journal, key: str | None) -> None:
        self.accounting = Accounting()
        self.occurrences = Occurrences()
        self._settings = settings
        self._journal = journal
        self._writer = GroupWriter(journal)
        self._transport = Transport(
            connect_timeout_s=settings.connect_timeout_s, silence_timeout_s=settings.silence_timeout_s
        )
        self._upstreams = Upstreams(settings.upstreams, self._transport, key)
        self._caller = Caller(settings, self._transport, self._upstreams, self.accounting, self._note_result_url)
        self._running: dict[bytes, asyncio.Task[Answer]] = {}
        self._on_their_way: Counter[tuple[str, str]] = Counter()
        """Running calls by rollout and digest."""
        self._outage: str | None = None
        self._models: Answer | None = None

    async def serve(self, request: Request, tag: str, gone: Callable[[], Awaitable[None]]) -> Served | None:
        """Answer one request; `None` when the harness hung up, which `gone` waits for.

        The call itself then goes on: it is paid for, and the next equal request gets its answer. Raises `CallError`
        when there is no answer.
        """
        claim = await self._claim(tag, request.digest)
        known = self._journal.find(claim.key)
        if known is not None and not (known.is_refusal and self._settings.upstreams):
            self.accounting.replay(known)
            logger.info("POST %s %s %d replayed", request.path, tag, known.status)
            return Served(known, "journal")
        task = self._running.get(claim.key.name)
        if task is not None:
            self.accounting.joined += 1
        elif reason := self._refusal():
            self.occurrences.give_back(claim)
            raise reason
        else:
            task = self._start(Call(claim.key, request), known)
        return await self._wait(claim, task, gone)

    async def _claim(self, tag: str, digest: str) -> Claim:
        """A number for this request, heeding that an equal one may have been hung up on a moment ago, to ask anew.

        The loop hears of a closed connection and of its successor in the same breath, so it is given a moment.
        """
        if self._on_their_way[tag, digest]:
            await asyncio.sleep(HEARING_S)
        return self.occurrences.claim(tag, digest)

    def _start(self, call: Call, known: Answer | None) -> asyncio.Task[Answer]:
        name = call.key.name
        task = asyncio.create_task(self._finish(call, known))
        self._running[name] = task
        self._on_their_way[call.key[:2]] += 1

        def ended(task: asyncio.Task[Answer]) -> None:
            del self._running[name]
            self._on_their_way[call.key[:2]] -= 1
            if not self._on_their_way[call.key[:2]]:
                del self._on_their_way[call.key[:2]]
            if not task.cancelled():
                task.exception()  # perhaps nobody waits any more; it is in the log

        task.add_done_callback(ended)
        return task

    async def _wait(
        self, claim: Claim, task: asyncio.Task[Answer], gone: Callable[[], Awaitable[None]]
    ) -> Served | None:
        watch = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self.occurrences.give_back(claim)
                return None
            return Served(task.result(), "upstream")
        except BaseException:
            self.occurrences.give_back(claim)
            raise
        finally:
            watch.cancel()

    async def _finish(self, call: Call, known: Answer | None) -> Answer:
        """Make the call and put its answer on disk, whoever still waits for it."""
        began = time.monotonic()
        try:
            answer = await self._caller.answer(call, self._journal.find_pending(call.key), self._refusal)
            answer = replace(answer, ms=round((time.monotonic() - call.began) * 1000))
            if known is None or (known.status, known.body) != (answer.status, answer.body):
                await self._writer.append(call.key, lines.encode_answer(call.key, answer))
        except CallError as error:
            self._give_up(call, error, began)
            raise
        except JournalError as error:
            refused = CallError(507, "journal_error", str(error))
            self._give_up(call, refused, began)
            raise refused from error
        self._outage = None
        self.accounting.finish(answer, call.first_data_s)
        log_call(call, answer.status, answer.ms)
        return answer

    def _give_up(self, call: Call, error: CallError, began: float) -> None:
        self.accounting.failed += 1
        if error.kind == "upstream_away":
            self._outage = str(error)
        log_call(call, error.status, round((time.monotonic() - began) * 1000))
        logger.warning("POST %s %s given up: %s", call.request.path, call.key.tag, error)

    def _refusal(self) -> CallError | None:
        """Why no call may be begun now."""
        if not self._settings.upstreams:
            return CallError(503, "replay_only", "this call is not in the journal, and there is no server to ask")
        if self._journal.error:
            return CallError(507, "journal_error", f"the journal cannot be written: {self._journal.error}")
        return None

    async def _note_result_url(self, key: CallKey, url: str) -> None:
        """So that a later proxy finds the result. Without room for the note, the call goes on: it is paid for."""
        try:
            await self._writer.append(key, lines.encode_pending(key, url))
        except JournalError as error:
            logger.warning("the result URL of %s is not noted: %s", key.tag, error)

    async def models(self) -> Answer:
        """What the server said of its models; a replay remembers it, or names the model that the run asks for."""
        if not self._settings.upstreams:
            return self._journal.find(MODELS) or named_model(self._settings.model)
        upstream = self._upstreams.choose()
        url = f"{upstream.base_url}/models"
        try:
            reply = await self._transport.send(
                "GET", url, headers=self._upstreams.headers_for(url), timeout_s=MODELS_TIMEOUT_S
            )
            answer = judge(reply)
        except Fault as fault:
            raise CallError(503, f"upstream_{fault.kind}", f"GET /v1/models: {fault}") from fault
        if self._models is None and not answer.is_refusal:
            self._models = answer  # once per process: the list holds times that differ each time
            try:
                await self._writer.append(MODELS, lines.encode_answer(MODELS, answer))
            except JournalError as error:
                raise CallError(507, "journal_error", str(error)) from error
        return answer

    def stats(self) -> dict[str, Any]:
        return {
            **self.accounting.describe(),
            "journaled": len(self._journal),
            "damaged": self._journal.damaged,
            "journal_error": self._journal.error,
            "outage": self._outage,
            "upstreams": [
                {"base_url": one.base_url, "outstanding": one.outstanding, "served": one.served, "ejected": one.away}
                for one in self._upstreams.all
            ],
        }

    async def close(self) -> None:
        """Give up what is in flight, write what is finished."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._upstreams.close()
        await self._transport.close()
        await self._writer.close()
        self._journal.close()


def log_call(call: Call, status: int, ms: int) -> None:
    logger.info(
        "POST %s %s %d %d ms tries=%d upstream=%s",
        call.request.path,
        call.key.tag,
        status,
        ms,
        call.tries,
        call.upstream,
    )


def named_model(model: str) -> Answer:
    listed = {"object": "list", "data": [{"id": model, "object": "model", "owned_by": "modal-eval"}]}
    return Answer(200, "application/json", orjson.dumps(listed))
