"""Plays the rule of the queue against a clock, without machines: who starts when, and when all is done."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from modal_eval.gpus.rule import Request, assign

Rule = Callable[[Sequence[Request], Sequence[str], Sequence[str]], Mapping[int, tuple[str, ...]]]


@dataclass(frozen=True)
class Job:
    """A job that arrives, waits for its GPUs and holds them for `duration_s`."""

    number: int
    arrives_s: float
    duration_s: float
    count: int
    allowed: frozenset[str]


@dataclass(frozen=True)
class Start:
    """When a job began, on which GPUs, and how many older ones waited when it came."""

    job: Job
    at_s: float
    gpus: tuple[str, ...]
    in_front: int

    @property
    def waited_s(self) -> float:
        return self.at_s - self.job.arrives_s


def simulate(jobs: Sequence[Job], gpus: Sequence[str], rule: Rule = assign) -> list[Start]:
    """Everything that starts on one machine whose GPUs belong to nobody else, in order.

    The queue is looked at when a job comes, when one ends, and when one loses its patience, as a poll would find it.
    """
    moments = sorted({job.arrives_s for job in jobs} | {job.arrives_s + 600.0 for job in jobs})
    heapq.heapify(moments)
    to_come = sorted(jobs, key=lambda job: (job.arrives_s, job.number))
    waiting: list[tuple[Job, int]] = []
    ends: list[tuple[float, tuple[str, ...]]] = []
    free, started = set(gpus), []
    while moments:
        now = heapq.heappop(moments)
        while ends and ends[0][0] <= now:
            free |= set(heapq.heappop(ends)[1])
        while to_come and to_come[0].arrives_s <= now:
            waiting.append((to_come.pop(0), len(waiting)))
        requests = [Request(job.number, job.count, job.allowed, now - job.arrives_s) for job, _ in waiting]
        given = rule(requests, [gpu for gpu in gpus if gpu in free], [gpu for gpu in gpus if gpu not in free])
        for job, in_front in [one for one in waiting if one[0].number in given]:
            taken = given[job.number]
            assert len(set(taken)) == job.count
            assert set(taken) <= free & job.allowed, "a GPU was given twice, or one that the job may not use"
            free -= set(taken)
            heapq.heappush(ends, (now + job.duration_s, taken))
            heapq.heappush(moments, now + job.duration_s)
            started.append(Start(job, now, taken, in_front))
        waiting = [one for one in waiting if one[0].number not in given]
    assert not waiting, f"never served: {waiting}"
    return started
