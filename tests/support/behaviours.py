"""How the scripted upstream treats a call: what may go wrong, and for which calls."""

from __future__ import annotations

from dataclasses import dataclass, fields
from email.utils import formatdate
from typing import Any, Literal, Self

Fault = Literal["", "close", "silent", "html", "broken_json", "cut"]


@dataclass(frozen=True)
class Behaviour:
    """Everything that can be scripted for one call; the defaults are a healthy server."""

    latency: float = 0.0
    """Seconds before the answer begins."""
    word_latency: float = 0.0
    """Seconds between the words of a streamed answer."""
    status: int = 200
    """Any other than 200 is answered as an OpenAI-shaped error."""
    retry_after: str | None = None
    """The header's value; `date+N` stands for the HTTP date N seconds from now."""
    fault: Fault = ""
    """`close`: no answer at all; `silent`: the socket stays open and says nothing; `html`: a proxy's page with status
    200; `broken_json`: half a JSON object, well framed; `cut`: half of the announced answer or stream, then a close."""
    hops: int = 0
    """Modal's protocol: this many 303s, each after `cut` seconds, before the result URL gives the answer."""
    cut: float = 0.0
    result_drops: int = 0
    """This many reloads of the result URL are closed without an answer."""
    result_status: int = 200
    """Status of the result URL; 404 or 410 is a result that has expired."""
    answer: str = "sampled"
    """A name of `answers.ANSWERS`, or the text itself."""
    finish_reason: str = "stop"

    @classmethod
    def of(cls, data: dict[str, Any]) -> Self:
        unknown = set(data) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"no such behaviour: {', '.join(sorted(unknown))}")
        return cls(**data)

    def retry_headers(self, now: float) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        if self.retry_after.startswith("date+"):
            return {"Retry-After": formatdate(now + float(self.retry_after[5:]), usegmt=True)}
        return {"Retry-After": self.retry_after}


@dataclass(frozen=True)
class Call:
    """What a rule can look at. Numbers start at 1."""

    number: int
    """Among all POSTs to a completion endpoint."""
    tag: str
    tag_number: int
    """Among those with this tag."""
    ask: int
    """Among those with this tag and body."""
    body: str
    """The body's text."""


@dataclass
class Rule:
    """A behaviour for the calls that match; the first rule that matches decides."""

    behaviour: dict[str, Any]
    """Changes to the default behaviour."""
    first: int = 1
    last: int | None = None
    """Numbers of the calls, both inclusive."""
    every: int = 1
    """Only each n-th call."""
    tag: str | None = None
    tag_last: int | None = None
    """Only the first calls of each tag."""
    asks: int | None = None
    """Only the first times that a (tag, body) is asked: `asks=1` fails every call once."""
    contains: str | None = None
    """Only bodies with this text."""
    times: int | None = None
    """Match at most this often."""

    def matches(self, call: Call) -> bool:
        return (
            (self.times is None or self.times > 0)
            and call.number >= self.first
            and (self.last is None or call.number <= self.last)
            and call.number % self.every == 0
            and self.tag in (None, call.tag)
            and (self.tag_last is None or call.tag_number <= self.tag_last)
            and (self.asks is None or call.ask <= self.asks)
            and (self.contains is None or self.contains in call.body)
        )


class Script:
    """The default behaviour and the rules that change it."""

    def __init__(self) -> None:
        self.default: dict[str, Any] = {}
        self.rules: list[Rule] = []
        self.known: dict[str, str] = {}
        """Right answers by question, for `answers.gsm8k`."""

    def update(self, data: dict[str, Any]) -> None:
        """Take `default`, `rules` and `known` from JSON; what is given replaces what was there."""
        if "default" in data:
            Behaviour.of(data["default"])
            self.default = data["default"]
        if "rules" in data:
            rules = [Rule(**rule) for rule in data["rules"]]
            for rule in rules:
                Behaviour.of(rule.behaviour)
            self.rules = rules
        self.known = data.get("known", self.known)

    def behaviour(self, call: Call) -> Behaviour:
        for rule in self.rules:
            if rule.matches(call):
                if rule.times is not None:
                    rule.times -= 1
                return Behaviour.of({**self.default, **rule.behaviour})
        return Behaviour.of(self.default)
