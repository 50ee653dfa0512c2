"""What makes a call this call: its rollout, its request, and a number that tells equal ones apart."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

NOT_ABOUT_THE_ANSWER = ("user", "safety_identifier", "metadata", "request_id", "priority", "prompt_cache_key")
"""Fields of a request that name its sender or its place in a queue. Some clients fill them with a fresh id each time,
and with it no call would be found again. `stream` and `stream_options` stay: they change the answer's bytes."""

TAG = re.compile(r"[ !#-\[\]-~]{0,128}")
"""Printable ASCII without quote and backslash, so that a tag stands in the journal as it is."""


class CallKey(NamedTuple):
    """Names one call of one run, in this attempt and in every later one."""

    tag: str
    """The rollout, as `example/rollout`; empty for a harness that does not say."""
    digest: str
    """SHA-256 of the request."""
    occurrence: int
    """Tells equal requests of one rollout apart, in the order in which they came."""

    @property
    def name(self) -> bytes:
        """16 bytes that stand for the key in memory."""
        return name_of(self.digest.encode(), b"%d" % self.occurrence, self.tag.encode())


def name_of(digest: bytes, occurrence: bytes, tag: bytes) -> bytes:
    return hashlib.blake2b(b"%s %s %s" % (digest, occurrence, tag), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Request:
    """A request body, understood as far as the proxy needs it."""

    path: str
    """With its query, as it goes upstream."""
    body: bytes
    digest: str
    stream: bool


def understand(path: str, body: bytes) -> Request:
    """Digest a request so that the order of its keys and its whitespace do not matter.

    Raises `ValueError` when the body is no JSON object.
    """
    parsed = parse_object(body)
    stream = parsed.get("stream") is True
    for field in NOT_ABOUT_THE_ANSWER:
        parsed.pop(field, None)
    try:
        canonical = orjson.dumps(parsed, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a number of more than 64 bits
        canonical = json.dumps(parsed, sort_keys=True, separators=(",", ":")).encode()
    return Request(path, body, hashlib.sha256(path.encode() + b"\n" + canonical).hexdigest(), stream)


def parse_object(body: bytes) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = json.loads(body)  # NaN and long integers: Python's clients send them
    if not isinstance(parsed, dict):
        raise ValueError(f"a {type(parsed).__name__} instead of an object")  # noqa: TRY004 - the bytes are at fault
    return parsed


class Claim(NamedTuple):
    """The right to one key until the pass ends or the claim is given back."""

    key: CallKey
    turn: int
    """The pass in which it was made."""


class Occurrences:
    """Hands out the smallest number that is free among equal requests of one rollout.

    A number is a bit, so that a thousand equal requests cost a small integer.
    """

    def __init__(self) -> None:
        self._taken: dict[bytes, int] = {}
        self._turn = 0

    def claim(self, tag: str, digest: str) -> Claim:
        name = name_of(digest.encode(), b"", tag.encode())
        taken = self._taken.get(name, 0)
        lowest_free = ~taken & (taken + 1)
        self._taken[name] = taken | lowest_free
        return Claim(CallKey(tag, digest, lowest_free.bit_length() - 1), self._turn)

    def give_back(self, claim: Claim) -> None:
        """The call failed, or nobody waited for its answer: the next equal request is this one, tried again."""
        if claim.turn == self._turn:
            name = name_of(claim.key.digest.encode(), b"", claim.key.tag.encode())
            self._taken[name] &= ~(1 << claim.key.occurrence)

    def begin_pass(self) -> None:
        """A harness starts over: its first request is number 0 again."""
        self._taken.clear()
        self._turn += 1
