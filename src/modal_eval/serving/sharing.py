"""What shared servers have in common, on Modal and here: a name that is the configuration, and a lease for each run.

Whoever gives back the last live lease of a name ends the server; a run that keeps its server leaves its lease there,
kept, until the deadline.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from modal_eval import paths
from modal_eval.records import Lease
from modal_eval.serving.leases import drop_lease, is_live, leases, write_lease


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Starting, sharing and ending one server happen one after the other, over all processes of this state."""
    folder = paths.state_dir() / "servers"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shares(name: str) -> list[Lease]:
    """The leases of those who use the server `name`, or keep it; not those of a keeper's own processes."""
    return [one for one in leases() if one.app == name and one.kind != "process"]


def others_of(lease: Lease) -> list[Lease]:
    """The other leases of the same server."""
    return [one for one in shares(lease.app) if one.lease_id != lease.lease_id]


def wanted(name: str) -> bool:
    """Whether anybody has a right to the server `name`."""
    return any(is_live(one) for one in shares(name))


def beginning(name: str) -> str:
    """Since when there is a server `name`, as far as its leases say; empty where there are none."""
    return min((one.since or one.created_at for one in shares(name)), default="")


def give_back(lease: Lease, end: Callable[[str], None]) -> bool:
    """Drop `lease`, with the leases of the dead and after `end`, if nobody else has a right to the server.

    Leases of another account stay: what bears the name there has not been ended. To be called under the server's lock.
    Returns whether it was the last one; what `end` raises leaves every lease.
    """
    others = others_of(lease)
    last = not any(is_live(one) for one in others)
    if last:
        end(lease.app)
        for one in others:
            if one.account in ("", lease.account):
                drop_lease(one)
    drop_lease(lease)
    return last


def keep(lease: Lease) -> Lease:
    """Leave the server to the next run for `keep_s` seconds; of several such leases the longest one stays.

    To be called under the server's lock.
    """
    kept = replace(lease, kept=True, deadline=time.time() + lease.keep_s)
    before = [
        one for one in others_of(lease) if (one.kept, one.account) == (True, lease.account) and one.deadline is not None
    ]
    longest = max([kept, *before], key=lambda one: one.deadline or 0)
    write_lease(longest)
    for one in [kept, *before]:
        if one.lease_id != longest.lease_id:
            drop_lease(one)
    return longest
