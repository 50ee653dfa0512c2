"""What the calls cost: for the live view, the report and the curious."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from modal_eval.proxy.lines import Answer

RECENT_S = 10
SAMPLES = 2048
"""Latencies that are kept: the latest, so that a number says how things are now and memory stays constant."""


class Accounting:
    """Counts calls, tokens and time since the proxy started; paid and replayed ones apart."""

    def __init__(self) -> None:
        self.finished = 0
        self.replayed = 0
        self.joined = 0
        """Answers that a second request got because the first one's harness had hung up."""
        self.failed = 0
        self.retries = 0
        self.redirects = 0
        self.faults: Counter[str] = Counter()
        self._waiting = 0
        self._in_flight = 0
        self._tokens = [0, 0]
        self._replayed_tokens = [0, 0]
        self._busy_s = 0.0
        self._busy_since = 0.0
        self._latencies: deque[float] = deque(maxlen=SAMPLES)
        self._first_data: deque[float] = deque(maxlen=SAMPLES)
        self._recent: deque[list[int]] = deque(maxlen=RECENT_S + 1)
        """(second, completion tokens), the latest last."""
        self._began = time.monotonic()

    @contextmanager
    def waits(self) -> Iterator[None]:
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        if self._in_flight == 0:
            self._busy_since = time.monotonic()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._busy_s += time.monotonic() - self._busy_since

    def finish(self, answer: Answer, first_data_s: float | None) -> None:
        self.finished += 1
        self._latencies.append(answer.ms)
        if first_data_s is not None:
            self._first_data.append(first_data_s * 1000)
        add(self._tokens, answer.tokens)
        second = int(time.monotonic())
        if self._recent and self._recent[-1][0] == second:
            self._recent[-1][1] += answer.tokens[1]
        else:
            self._recent.append([second, answer.tokens[1]])

    def replay(self, answer: Answer) -> None:
        self.replayed += 1
        add(self._replayed_tokens, answer.tokens)

    def describe(self) -> dict[str, Any]:
        now = time.monotonic()
        busy_s = self._busy_s + (now - self._busy_since if self._in_flight else 0.0)
        recent = sum(tokens for second, tokens in self._recent if second > now - RECENT_S)
        return {
            "finished": self.finished,
            "replayed": self.replayed,
            "joined": self.joined,
            "failed": self.failed,
            "in_flight": self._in_flight,
            "waiting": self._waiting,
            "retries": self.retries,
            "redirects": self.redirects,
            "faults": dict(self.faults),
            "prompt_tokens": self._tokens[0],
            "completion_tokens": self._tokens[1],
            "replayed_prompt_tokens": self._replayed_tokens[0],
            "replayed_completion_tokens": self._replayed_tokens[1],
            "tokens_per_s": round(recent / max(1.0, min(RECENT_S, now - self._began)), 1),
            "latency_ms": {"p50": quantile(self._latencies, 0.5), "p95": quantile(self._latencies, 0.95)},
            "first_token_ms": {"p50": quantile(self._first_data, 0.5), "p95": quantile(self._first_data, 0.95)},
            "busy_s": round(busy_s, 3),
        }


def add(total: list[int], tokens: tuple[int, int]) -> None:
    total[0] += tokens[0]
    total[1] += tokens[1]


def quantile(values: deque[float], share: float) -> float | None:
    """The value at `share` of the way through the sorted values (nearest rank); `None` for none."""
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)
