"""The journal's lines: JSON for people and for jq, with a beginning of fixed form for the proxy.

    {"crc":"0f3c…","n":      1234,"kind":"answer","digest":"…","occ":0,"tag":"17/3","status":200,…,"json":{…}}

`n` counts the bytes behind its comma up to the closing brace, so that a reader leaps from line to line without looking
at an answer. `crc` covers the same bytes: a line that was damaged is found out when it is wanted. The answer comes last:
`json` as the server sent it, byte by byte, `text` for a stream or JSON of several lines, `base64` for anything else.
"""

from __future__ import annotations

import base64
import re
import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from modal_eval.proxy.keys import CallKey, name_of

VERSION = 1
MAX_HEAD = 384
"""Every line's key ends within so many bytes: a tag has at most 128."""

_LEAD = len(b'{"crc":"00000000","n":0000000000,')
_HEAD = re.compile(
    rb'\{"crc":"([0-9a-f]{8})","n":( *\d+),"kind":"(answer|pending)",'
    rb'"digest":"([0-9a-f]{64})","occ":(\d+),"tag":"([^"\\]*)",'
)
_BODY = re.compile(rb',"(json|text|base64)":')

Kind = Literal["answer", "pending"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished response, as it goes to the harness."""

    status: int
    content_type: str
    body: bytes
    tokens: tuple[int, int] = (0, 0)
    """Prompt and completion tokens, as the server counted them."""
    ms: int = 0
    """From the harness's request to the whole answer."""

    @property
    def is_refusal(self) -> bool:
        """The server found fault with the request: nothing was generated."""
        return self.status >= 400


class Head(NamedTuple):
    """What is read of a line when a journal is opened."""

    kind: Kind
    name: bytes
    length: int
    """Of the whole line, newline included."""


def encode_header(identity: dict[str, Any], created: str) -> bytes:
    return orjson.dumps({"modal_eval_journal": VERSION, "created": created, "identity": identity}) + b"\n"


def encode_answer(key: CallKey, answer: Answer) -> bytes:
    meta = {
        "status": answer.status,
        "type": answer.content_type,
        "tokens": answer.tokens,
        "ms": answer.ms,
    }
    return _line(b"answer", key, orjson.dumps(meta)[1:-1] + _encode_body(answer.body))


def encode_pending(key: CallKey, url: str) -> bytes:
    return _line(b"pending", key, orjson.dumps({"url": url})[1:-1])


def _line(kind: bytes, key: CallKey, fields: bytes) -> bytes:
    rest = b'"kind":"%s","digest":"%s","occ":%d,"tag":"%s",%s}' % (
        kind, key.digest.encode(), key.occurrence, key.tag.encode("ascii"), fields,
    )  # fmt: skip
    return b'{"crc":"%08x","n":%10d,%s\n' % (zlib.crc32(rest), len(rest), rest)


def _encode_body(body: bytes) -> bytes:
    if b"\n" not in body and b"\r" not in body:
        try:
            orjson.loads(body)
        except orjson.JSONDecodeError:
            pass
        else:
            return b',"json":' + body
    try:
        return b',"text":' + orjson.dumps(body.decode())
    except UnicodeDecodeError:
        return b',"base64":"%s"' % base64.b64encode(body)


def read_head(data: bytes) -> Head | None:
    """The head of the line that begins `data`; `None` when no line of ours begins so."""
    found = _HEAD.match(data)
    if found is None:
        return None
    _, count, kind, digest, occurrence, tag = found.groups()
    return Head("answer" if kind == b"answer" else "pending", name_of(digest, occurrence, tag), _LEAD + int(count) + 1)


def _intact(line: bytes) -> bool:
    """Whether the checksum holds."""
    found = _HEAD.match(line)
    return found is not None and zlib.crc32(line[_LEAD:-1]) == int(found.group(1), 16)


def decode_answer(line: bytes) -> Answer | None:
    """The answer on a line; `None` when the line is damaged."""
    found = _BODY.search(line) if _intact(line) else None
    if found is None:
        return None
    meta = orjson.loads(line[: found.start()] + b"}")
    body = line[found.end() : -2]
    if found.group(1) == b"text":
        body = orjson.loads(body).encode()
    elif found.group(1) == b"base64":
        body = base64.b64decode(body[1:-1])
    prompt, completion = meta["tokens"]
    return Answer(meta["status"], meta["type"], body, (prompt, completion), meta["ms"])


def decode_pending(line: bytes) -> str | None:
    """The result URL on a line; `None` when the line is damaged."""
    return str(orjson.loads(line)["url"]) if _intact(line) else None
