"""What can go wrong between us and the server, and what a harness is told when it stays wrong."""

from __future__ import annotations

import email.utils
import time
from typing import Literal

import orjson

AWAY = frozenset({429, 502, 503})
"""The server, or what stands in front of it, says that it will be back."""
RETRYABLE = frozenset({408, 409, 425, *AWAY, *range(500, 600)})
OF_THE_REQUEST = frozenset({400, 413, 422})
"""The request itself is at fault (a prompt that is too long, say): an answer of the server, not a failure of ours."""

Severity = Literal["away", "failed", "final"]


class Fault(Exception):  # noqa: N818 - a try that failed, not yet an error
    """One failed try."""

    def __init__(
        self, kind: str, message: str, severity: Severity, *, retry_after_s: float | None = None, dropped: bool = False
    ) -> None:
        super().__init__(message)
        self.kind = kind
        """Counted under this name."""
        self.severity = severity
        """`away` is waited for by time, `failed` is tried again so many times, `final` is not tried again."""
        self.retry_after_s = retry_after_s
        self.dropped = dropped
        """The connection broke or was refused: the replica itself is in doubt."""


class CallError(Exception):
    """A call that is given up: what the harness gets instead of an answer."""

    def __init__(self, status: int, kind: str, message: str, *, relayed: bytes | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.relayed = relayed
        """The server's own words, when it refused."""

    def body(self) -> bytes:
        return error_body(str(self), self.kind, self.status) if self.relayed is None else self.relayed


def error_body(message: str, kind: str, status: int) -> bytes:
    """An error in the shape that OpenAI's clients read."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})


def of_status(status: int, body: bytes, retry_after_header: str | None) -> Fault:
    return Fault(
        f"status_{status}", f"HTTP {status}: {excerpt(body)}", "away" if status in AWAY else "failed",
        retry_after_s=retry_after(retry_after_header),
    )  # fmt: skip


def excerpt(body: bytes, length: int = 200) -> str:
    return " ".join(body[:length].decode(errors="replace").split())


def retry_after(value: str | None) -> float | None:
    """Seconds that the server asks for: a number, or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:  # neither form: as if it were not there
        return None
