"""The replicas: the least busy one gets the next call, one that is away is left out until it answers again."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from modal_eval.proxy.faults import Fault
from modal_eval.proxy.transport import Transport

logger = logging.getLogger(__name__)

PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Upstream:
    """One replica."""

    index: int
    base_url: str
    outstanding: int = 0
    served: int = 0
    """Calls that were sent to it."""
    turn: int = 0
    """When it was chosen last, so that equally busy replicas take turns."""
    away: bool = False
    """Its connection broke; it gets calls again when it answers a probe."""
    rests_until: float = 0.0
    """It said that it is busy; until then the others get its calls."""
    probe: asyncio.Task[None] | None = None

    @property
    def root(self) -> str:
        return self.base_url.removesuffix("/v1")


class Upstreams:
    """Chooses replicas and finds out when one that went away is back."""

    def __init__(self, base_urls: tuple[str, ...], transport: Transport, key: str | None) -> None:
        self.all = [Upstream(index, url.rstrip("/")) for index, url in enumerate(base_urls)]
        self._origins = {origin(upstream.base_url) for upstream in self.all}
        self._transport = transport
        self._key = key
        self._turn = 0
        self._one_is_back = asyncio.Event()
        self._away_since: float | None = None

    def choose(self, *, avoid: Upstream | None = None) -> Upstream:
        """The present replica with the fewest calls, rather none that rests and not `avoid`.

        When all are away it is the least busy of them: a call is a probe, too.
        """
        now = time.monotonic()
        candidates = [one for one in self.all if not one.away] or self.all
        chosen = min(candidates, key=lambda one: (one is avoid, one.rests_until > now, one.outstanding, one.turn))
        self._turn += 1
        chosen.turn = self._turn
        return chosen

    def let_rest(self, upstream: Upstream, seconds: float) -> None:
        """A replica that refuses quickly would otherwise always be the least busy one, and be chosen first."""
        upstream.rests_until = time.monotonic() + seconds

    def has_other_than(self, upstream: Upstream) -> bool:
        return any(not one.away for one in self.all if one is not upstream)

    def headers_for(self, url: str) -> dict[str, str]:
        """The key goes to the upstreams' own addresses and to no other, wherever a redirect points."""
        return {"authorization": f"Bearer {self._key}"} if self._key and self.knows(url) else {}

    def knows(self, url: str) -> bool:
        return origin(url) in self._origins

    def away_s(self) -> float:
        """For how long every replica has been away."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    def suspect(self, upstream: Upstream) -> None:
        """Leave `upstream` out until it answers: its connection broke."""
        if upstream.away:
            return
        upstream.away = True
        if self._away_since is None and all(one.away for one in self.all):
            self._away_since = time.monotonic()
            self._one_is_back.clear()
        upstream.probe = asyncio.create_task(self._probe(upstream))

    def welcome(self, upstream: Upstream) -> None:
        """`upstream` answered."""
        if upstream.away:
            upstream.away = False
            upstream.rests_until = 0.0
            self._away_since = None
            self._one_is_back.set()
            logger.warning("upstream %d (%s) is back", upstream.index, upstream.base_url)

    async def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until a replica is back when all of them are away."""
        if self._away_since is None:
            await asyncio.sleep(seconds)
            return
        try:
            async with asyncio.timeout(seconds):
                await self._one_is_back.wait()
        except TimeoutError:
            return

    async def _probe(self, upstream: Upstream) -> None:
        logger.warning("upstream %d (%s) is in doubt", upstream.index, upstream.base_url)
        while upstream.away:
            if await self._answers(upstream):
                self.welcome(upstream)
                return
            await asyncio.sleep(PROBE_INTERVAL_S)

    async def _answers(self, upstream: Upstream) -> bool:
        """Any answer below 500 but 404, which only says that there is no such route."""
        for url in (f"{upstream.root}/health", f"{upstream.base_url}/models"):
            try:
                reply = await self._transport.send("GET", url, headers=self.headers_for(url), timeout_s=PROBE_TIMEOUT_S)
            except Fault:
                return False
            if reply.status != 404:
                return reply.status < 500
        return True

    async def close(self) -> None:
        probes = [one.probe for one in self.all if one.probe]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)


def origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
