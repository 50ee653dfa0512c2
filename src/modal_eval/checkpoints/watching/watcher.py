"""Looks for new checkpoints and announces each content once."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from modal_eval.checkpoints.s3_objects import Address, Manifest, RefusedError, UnreachableError, wanted
from modal_eval.checkpoints.watching.announcement import Announcement
from modal_eval.checkpoints.watching.memory import Content, File, Memory, Record
from modal_eval.checkpoints.watching.sources import Listing, Queue, list_folder, list_folders
from modal_eval.checkpoints.watching.whole import whole
from modal_eval.errors import CheckpointError, ModalEvalError

logger = logging.getLogger(__name__)

SIGNS = ("config.json", "*.safetensors", "pytorch_model*.bin")
"""A folder with none of these is no checkpoint on its way."""

Kind = Literal["announced", "known", "waiting", "too old", "no checkpoint"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one look at one address."""

    kind: Kind
    why: str = ""
    announcement: Announcement | None = None


@dataclass(slots=True)
class Watcher:
    """One watch over the checkpoints at and below `where`."""

    client: Any
    where: Address
    memory: Memory
    announce: Callable[[Announcement, bool], None]
    """Returns once the announcement has arrived. Its second argument says that it may have been sent before."""
    queue: Queue | None = None
    settle_s: float = 60
    """A checkpoint is left alone until its newest file is this old: one that is whole may still get small files, or be
    written over another."""
    max_age_s: float = math.inf
    """A checkpoint whose newest file is older is none of ours: a new watch does not announce the past."""
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, duration_s: float, interval_s: float) -> None:
        """Look again and again for `duration_s`; with 0 once.

        A fault that may pass by itself ends only a single look, and so does any fault once a look has worked.
        """
        end = time.monotonic() + duration_s
        has_worked = False
        while True:
            try:
                self.look(wait_s=max(min(interval_s, end - time.monotonic()), 0))
                has_worked = True
            except ModalEvalError as error:
                if time.monotonic() >= end or not (error.retryable or has_worked):
                    raise
                logger.warning("%s; trying again in %g s", error, interval_s)
                time.sleep(interval_s)
            if (left := end - time.monotonic()) <= 0:
                return
            if self.queue is None:
                time.sleep(min(interval_s, left))

    def look(self, wait_s: float = 0) -> Counter[str]:
        """Look once at everything there is to look at; returns how often each kind of outcome came.

        Waits up to `wait_s` for a first message where there is a queue. What is wrong with one address is raised once the
        others have been looked at.
        """
        before = self.counts.copy()
        listings: dict[Address, Listing] = {}
        if self.queue is None:
            listings = list_folders(self.client, self.where)
        else:
            for folders, receipts in self.queue.batches(wait_s):
                for folder in filter(self.covers, folders):
                    self.memory.mark(folder)
                self.queue.delete(receipts)
        self._look_at_each(self._due(listings), listings)
        return self.counts - before

    def look_at_open(self) -> None:
        """Look at what was not whole, or not old enough, the last time; raises as `look` does."""
        self._look_at_each(self.memory.open_addresses(), {})

    def _look_at_each(self, addresses: Iterable[Address], listings: Mapping[Address, Listing]) -> None:
        faults = []
        for address in addresses:
            try:
                self.look_at(address, listings.get(address))
            except UnreachableError:
                raise
            except CheckpointError as error:
                logger.warning("%s", error)
                faults.append(error)
        if faults:
            raise faults[0]

    def _due(self, listings: dict[Address, Listing]) -> Iterator[Address]:
        """What is waited for, then whatever else was listed and may be new."""
        waiting = self.memory.open_addresses()
        yield from waiting
        for address, listing in listings.items():
            if address in waiting or not has_signs(listing):
                continue
            if listing.age_s > self.max_age_s:
                self.counts["too old"] += 1
            else:
                yield address

    def covers(self, address: Address) -> bool:
        """Whether `address` is at or below the watched one."""
        below = f"{self.where.prefix}/" if self.where.prefix else ""
        return address.bucket == self.where.bucket and f"{address.prefix}/".startswith(below)

    def look_at(self, address: Address, listing: Listing | None = None) -> Outcome:
        """Look at one address, and announce what is new and whole there."""
        with self.memory.record(address) as (record, save):
            for content in record.contents:
                if content.state == "sending":
                    self._send(content, save, again=True)
            outcome = self._judge(address, record, save, listing or list_folder(self.client, address))
        self.counts[outcome.kind] += 1
        if outcome.kind == "announced":
            logger.info("announced %s", address)
        return outcome

    def _judge(self, address: Address, record: Record, save: Callable[[], None], listing: Listing | None) -> Outcome:
        if listing is None or not has_signs(listing):
            return self._close(record, save, Outcome("no checkpoint", "no file of a model is there"))
        seen = digest(listing)
        if record.waiting and record.seen == seen and listing.age_s <= self.max_age_s:
            return Outcome("waiting", record.waiting)
        files = {name: listing.files[name] for name in wanted(list(listing.files), address, "folder")}
        if content := record.content_of(files):
            return self._close(record, save, Outcome("known", announcement=content.announcement))
        if listing.age_s > self.max_age_s:
            said = f"; it was last {record.waiting}" if record.waiting else ""
            logger.warning("%s is %.0f h old and is not announced%s", address, listing.age_s / 3600, said)
            return self._close(record, save, Outcome("too old", f"its newest file is {listing.age_s / 3600:.0f} h old"))
        if listing.age_s < self.settle_s:
            return self._wait(record, save, "still being written", None)
        try:
            manifest = whole(self.client, address)
        except UnreachableError:
            raise
        except RefusedError as error:
            if record.waiting != str(error):
                logger.warning("%s", error)
            return self._wait(record, save, str(error), None)  # an equal listing may be answered the next time
        except CheckpointError as error:
            return self._wait(record, save, str(error), seen)
        return self._announce(address, record, save, manifest)

    def _announce(self, address: Address, record: Record, save: Callable[[], None], manifest: Manifest) -> Outcome:
        files = {one.name: File(one.size, one.etag, one.algorithm, one.checksum) for one in manifest.objects}
        if content := record.content_of(files):
            content.files = {**content.files, **files}  # the next look knows it by its new ETags
            record.waiting = None
            save()
            return Outcome("known", announcement=content.announcement)
        content = Content(Announcement.of(address, f"sha256:{manifest.digest()}"), files, "sending")
        record.contents.append(content)
        record.waiting = record.seen = None
        save()
        self._send(content, save, again=False)
        return Outcome("announced", announcement=content.announcement)

    def _send(self, content: Content, save: Callable[[], None], *, again: bool) -> None:
        self.announce(content.announcement, again)
        content.state = "announced"
        save()

    def _wait(self, record: Record, save: Callable[[], None], why: str, seen: str | None) -> Outcome:
        if (record.waiting, record.seen) != (why, seen):
            record.waiting, record.seen = why, seen
            save()
        return Outcome("waiting", why)

    def _close(self, record: Record, save: Callable[[], None], outcome: Outcome) -> Outcome:
        if record.waiting:
            record.waiting = record.seen = None
            save()
        return outcome


def has_signs(listing: Listing) -> bool:
    return any(fnmatch.fnmatch(name, sign) for name in listing.files for sign in SIGNS)


def digest(listing: Listing) -> str:
    rows = [[name, file.size, file.etag] for name, file in sorted(listing.files.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
