"""One call, from the first try to the answer: retries, outages, and Modal's 303."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import urljoin

from modal_eval.proxy.accounting import Accounting
from modal_eval.proxy.faults import CallError, Fault
from modal_eval.proxy.keys import CallKey, Request
from modal_eval.proxy.lines import Answer
from modal_eval.proxy.replies import Reply, judge
from modal_eval.proxy.settings import ProxySettings
from modal_eval.proxy.transport import Transport
from modal_eval.proxy.upstreams import Upstream, Upstreams

logger = logging.getLogger(__name__)

SEE_OTHER = 303
RESULT_IS_GONE = frozenset({404, 410})
JSON = {"content-type": "application/json"}
ROLLOUT_HEADER = "x-modal-eval-rollout"
"""Goes upstream, too, so that a server's log can be read beside ours."""


@dataclass(slots=True)
class Call:
    """A call on its way, and what became of it so far."""

    key: CallKey
    request: Request
    began: float = 0.0
    """When it got its place among those in flight, on the monotonic clock."""
    tries: int = 0
    upstream: int | None = None
    first_data_s: float | None = None
    last_fault: Fault | None = None


class ResultGone(Exception):  # noqa: N818 - no error by itself: the call is made anew
    """The server does not know the result of this URL any more."""


class Patience:
    """How long one call puts up with a server: so many failures, and so many seconds of absence at a stretch."""

    def __init__(self, settings: ProxySettings) -> None:
        self._settings = settings
        self._failed = 0
        self._away = 0
        self._away_since: float | None = None

    def pause_after(self, fault: Fault) -> float:
        """Seconds to wait before the next try: full jitter on top of what the server asked for.

        Raises `CallError` when the call is to be given up.
        """
        if fault.severity == "final":
            raise CallError(502, f"upstream_{fault.kind}", str(fault))
        now = time.monotonic()
        if fault.severity == "away":
            self._away += 1
            self._away_since = self._away_since or now
            if now - self._away_since > self._settings.outage_timeout_s:
                raise CallError(503, "upstream_away", f"the server is away for {now - self._away_since:.0f} s: {fault}")
            if (fault.retry_after_s or 0.0) > self._settings.outage_timeout_s:
                raise CallError(
                    503, "upstream_away", f"the server will be away for {fault.retry_after_s:.0f} s: {fault}"
                )
        else:
            self._failed += 1
            self._away, self._away_since = 0, None
            if self._failed > self._settings.retries:
                raise CallError(
                    502, f"upstream_{fault.kind}", f"gave up after {self._failed} failures; the last: {fault}"
                )
        return self.backoff(self._away or self._failed) + (fault.retry_after_s or 0.0)

    def backoff(self, count: int) -> float:
        ceiling = min(self._settings.retry_cap_s, self._settings.retry_base_s * 2 ** min(count - 1, 16))
        return random.uniform(0, ceiling)  # noqa: S311 - spreads load, hides nothing


class Caller:
    """Makes calls upstream until they are answered or given up."""

    def __init__(
        self,
        settings: ProxySettings,
        transport: Transport,
        upstreams: Upstreams,
        accounting: Accounting,
        note_result_url: Callable[[CallKey, str], Awaitable[None]],
    ) -> None:
        self._settings = settings
        self._transport = transport
        self._upstreams = upstreams
        self._accounting = accounting
        self._note_result_url = note_result_url
        self._places = asyncio.Semaphore(settings.max_in_flight)

    async def answer(self, call: Call, result_url: str | None, refusal: Callable[[], CallError | None]) -> Answer:
        """The server's answer. Raises `CallError` when the call is given up.

        With `result_url` the server already works on this call: its result is fetched, and the call is made anew only
        when the server does not know it any more. `refusal` is asked before each try that would be paid for.
        """
        with self._accounting.waits():
            await self._places.acquire()
        call.began = time.monotonic()
        try:
            with self._accounting.in_flight():
                async with asyncio.timeout(self._settings.call_timeout_s):
                    return await self._until_answered(call, result_url, refusal)
        except TimeoutError:
            last = f"; the last fault: {call.last_fault}" if call.last_fault else ""
            limit = self._settings.call_timeout_s
            raise CallError(504, "timeout", f"no answer within {limit:g} s and {call.tries} tries{last}") from None
        finally:
            self._places.release()

    async def _until_answered(
        self, call: Call, result_url: str | None, refusal: Callable[[], CallError | None]
    ) -> Answer:
        patience = Patience(self._settings)
        upstream: Upstream | None = None
        while True:
            if result_url is None and (reason := refusal()):
                raise reason
            upstream = self._upstreams.choose(avoid=upstream)
            call.tries += 1
            call.upstream = upstream.index
            try:
                return await self._try_once(call, upstream, result_url)
            except ResultGone as gone:
                fault = Fault("result_gone", str(gone), "failed")
            except Fault as failed:
                fault = failed
            result_url = None
            self._note(call, fault)
            pause = patience.pause_after(fault)
            if fault.severity == "away":
                self._upstreams.let_rest(upstream, pause)
            self._accounting.retries += 1
            if call.tries < len(self._upstreams.all) and self._upstreams.has_other_than(upstream):
                continue
            await self._upstreams.pause(pause)

    async def _try_once(self, call: Call, upstream: Upstream, result_url: str | None) -> Answer:
        upstream.outstanding += 1
        try:
            if result_url is None:
                upstream.served += 1
                reply = await self._post(call, upstream)
                if reply.status != SEE_OTHER:
                    return judge(reply)
                result_url = reply_location(reply, upstream.root + call.request.path)
                await self._note_result_url(call.key, result_url)
            return await self._result(call, result_url)
        finally:
            upstream.outstanding -= 1

    async def _post(self, call: Call, upstream: Upstream) -> Reply:
        url = upstream.root + call.request.path
        headers = JSON | {ROLLOUT_HEADER: call.key.tag} | self._upstreams.headers_for(url)
        try:
            reply = await self._transport.send("POST", url, body=call.request.body, headers=headers)
        except Fault as fault:
            if fault.dropped:
                self._upstreams.suspect(upstream)
            raise
        self._upstreams.welcome(upstream)
        call.first_data_s = reply.first_data_s
        return reply

    async def _result(self, call: Call, url: str) -> Answer:
        """Modal's protocol: GET the result URL until it answers; a second POST would pay a second time.

        There is no limit on hops and lost connections but the call's own time. Raises `ResultGone` when there is no
        result to wait for.
        """
        patience = Patience(self._settings)
        failures = 0
        while True:
            began = time.monotonic()
            try:
                reply = await self._transport.send("GET", url, headers=self._upstreams.headers_for(url))
                if reply.status in RESULT_IS_GONE:
                    raise ResultGone(f"the result URL answers HTTP {reply.status}")
                if reply.status != SEE_OTHER:
                    return judge(reply)
            except Fault as fault:
                failures += 1
                self._note(call, fault)
                if fault.severity == "final" or (failures > self._settings.retries and self._is_lost(url, fault)):
                    raise ResultGone(f"the result URL gives no result: {fault}") from fault
                pause = patience.pause_after(fault) if fault.severity == "away" else patience.backoff(failures)
                await self._upstreams.pause(max(pause, fault.retry_after_s or 0.0))
                continue
            patience, failures = Patience(self._settings), 0
            self._accounting.redirects += 1
            following = reply_location(reply, url)
            if following != url:
                url = following
                await self._note_result_url(call.key, url)
            # Modal holds a request for 150 s; a server that redirects at once is not to be asked in a tight loop.
            await asyncio.sleep(max(0.0, self._settings.retry_base_s / 5 - (time.monotonic() - began)))

    def _is_lost(self, url: str, fault: Fault) -> bool:
        """A result URL that keeps saying 500 is a function that failed; one elsewhere, an earlier server's address."""
        return fault.kind.startswith("status_5") or not self._upstreams.knows(url)

    def _note(self, call: Call, fault: Fault) -> None:
        call.last_fault = fault
        self._accounting.faults[fault.kind] += 1
        logger.info(
            "%s %s try %d at upstream %s: %s", call.request.path, call.key.tag, call.tries, call.upstream, fault
        )


def reply_location(reply: Reply, base: str) -> str:
    if not reply.location:
        raise Fault("no_location", "HTTP 303 without a Location", "failed")
    return urljoin(base, reply.location)
