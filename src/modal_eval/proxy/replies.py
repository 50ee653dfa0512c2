"""What the server sent: an answer, a refusal, or a fault that looks like an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from modal_eval.proxy.faults import OF_THE_REQUEST, RETRYABLE, CallError, Fault, excerpt, of_status
from modal_eval.proxy.lines import Answer

DONE = re.compile(rb"data: ?\[DONE\]\s*$")
STREAMED_ERROR = re.compile(rb'^data: ?(\{"error".*\})\s*$', re.MULTILINE)
PLAIN_TYPE = re.compile(r"[\w.+/; =-]{1,100}")


@dataclass(frozen=True, slots=True)
class Reply:
    """One response, read to its end."""

    status: int
    content_type: str
    body: bytes
    location: str = ""
    retry_after: str | None = None
    first_data_s: float | None = None
    """When the first event of a stream came, counted from the request."""


def judge(reply: Reply) -> Answer:
    """The answer in a reply.

    A refusal of the request (400, 413, 422) is an answer, too. Raises `Fault` for what may go away, and `CallError`
    with the server's own words for every other refusal.
    """
    status = reply.status
    if status in RETRYABLE:
        raise of_status(status, reply.body, reply.retry_after)
    content_type = reply.content_type if PLAIN_TYPE.fullmatch(reply.content_type) else "application/json"
    if status in OF_THE_REQUEST:
        return Answer(status, content_type, reply.body)
    if not 200 <= status < 300:
        if status < 400:
            raise CallError(
                502, "upstream_redirect", f"the server redirects to {reply.location or 'nowhere'} (HTTP {status})"
            )
        raise CallError(status, "upstream_refused", f"HTTP {status}: {excerpt(reply.body)}", relayed=reply.body)
    if "event-stream" in content_type:
        return Answer(status, content_type, reply.body, tokens_of_stream(whole_stream(reply.body)))
    return Answer(status, content_type, reply.body, tokens_of(whole_json(reply.body)))


def whole_stream(body: bytes) -> bytes:
    """A stream that came to its end; half of one may look like a finished answer, only shorter."""
    if DONE.search(body[-64:]) is None:
        raise Fault("half_stream", f"the stream ended without [DONE], after {len(body)} bytes", "failed")
    if found := STREAMED_ERROR.search(body):
        raise Fault("error_in_200", f"an error inside the stream: {excerpt(found.group(1))}", "failed")
    return body


def whole_json(body: bytes) -> Any:
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise Fault("no_json", f"HTTP 200 without JSON: {excerpt(body, 120)}", "failed") from None
    if isinstance(found, dict) and found.get("error") and "choices" not in found:
        raise Fault("error_in_200", f"HTTP 200 with an error inside: {excerpt(body)}", "failed")
    return found


def tokens_of(answer: Any) -> tuple[int, int]:
    """Prompt and completion tokens, as the server counted them; 0 where it does not say."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return 0, 0
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return (prompt if isinstance(prompt, int) else 0, completion if isinstance(completion, int) else 0)


def tokens_of_stream(body: bytes) -> tuple[int, int]:
    """From the last chunk that has a usage, which is there when the harness asked for it."""
    at = body.rfind(b'"usage":{') if b'"usage":{' in body else body.rfind(b'"usage": {')
    if at < 0:
        return 0, 0
    start = body.rfind(b"data:", 0, at) + len(b"data:")
    end = body.find(b"\n", at)
    try:
        return tokens_of(orjson.loads(body[start:end]))
    except orjson.JSONDecodeError:  # the word stood inside a text
        return 0, 0
