"""Who gets which GPUs: first come, first served, with small requests filling gaps. Pure.

The rule, in the order in which the requests came:

1. A request gets its GPUs as soon as as many as it wants are free for it: all of them or none.
2. One that does not get them may be overtaken by younger ones that fit, so that no GPU idles beside a waiting request.
3. Once it has waited for `PATIENCE_S` it is overtaken no more: the free GPUs that it could use are kept for it, though
   they are still too few. That is only done for a request that the end of our own leases can satisfy; one that waits
   for a stranger's GPU keeps nothing, since nobody knows until when.

So none starves: with leases that last at most L, a request in front of which m others wait is served within
`PATIENCE_S + (m + 1) × L`. From the moment it has lost its patience, so have those in front of it; each GPU that any of
them could use goes to the oldest, which has its GPUs when the leases of that moment have ended; and so on in turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

PATIENCE_S = 600.0
"""How long a request may be overtaken: about as long as one small evaluation, so that gathering eight GPUs for a big one
does not leave seven idle again and again."""


@dataclass(frozen=True)
class Request:
    """A request for `count` GPUs out of `allowed` (UUIDs), by whoever waits under `number`."""

    number: int
    count: int
    allowed: frozenset[str]
    waited_s: float = 0.0


def assign(
    waiting: Sequence[Request],
    free: Sequence[str],
    leased: Collection[str],
    patience_s: float = PATIENCE_S,
) -> Mapping[int, tuple[str, ...]]:
    """The GPUs of each request that may have them now, by the request's number.

    `waiting` is in the order of arrival. `free` are the GPUs that nobody uses, in the order in which they are to be
    given; `leased` those that come back when one of our own leases ends. Of the GPUs that fit, a request gets those
    that the fewest others are waiting for.
    """
    given: dict[int, tuple[str, ...]] = {}
    left = list(free)
    coming = set(free) | set(leased)
    for request in waiting:
        fitting = [gpu for gpu in left if gpu in request.allowed]
        if len(fitting) >= request.count:
            others = [one for one in waiting if one is not request]
            fitting.sort(key=lambda gpu: sum(gpu in one.allowed for one in others))
            given[request.number] = tuple(fitting[: request.count])
            left = [gpu for gpu in left if gpu not in given[request.number]]
        elif request.waited_s >= patience_s and len(coming & request.allowed) >= request.count:
            left = [gpu for gpu in left if gpu not in request.allowed]
    return given
