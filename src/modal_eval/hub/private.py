"""What must not leave this machine: keys, host names, places in the file system, addresses of servers."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from modal_eval import paths
from modal_eval.records import SERVER_KEY_PREFIX

Kind = Literal["secret", "path", "host", "url"]

SECRET_NAME = re.compile(
    r"(?i)token|secret|passw|api_?key|access_?key|private_?key|credential|authorization|auth_string"
)
SECRET_KEY = re.compile(
    r"(?i)(?:^|[_-])(?:token|secret|passw(?:or)?d|(?:api|access|private)_?key|credentials?|authorization)$"
)
"""Of a document of ours."""
ESCAPED = rb"(?<=\\[nrtbf])"
"""In JSON text a line's first word stands directly behind the `n` of its escaped newline."""
SECRET_FORMS = re.compile(
    rb"(?:(?<![A-Za-z0-9])|%s)(?:hf_[A-Za-z0-9]{20,}|sk-(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    rb"|AKIA[0-9A-Z]{16}|xox[abpr]-[A-Za-z0-9-]{10,})" % ESCAPED
)
"""Keys that can be told by their form, whoever owns them."""
SECRET_MARKS = (b"hf_", b"sk-", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"AKIA", b"xox")
RESULT_MARK = b"__modal_function_call_id="
RESULT_URL = re.compile(rb"https?://[^\s\"'\\]+__modal_function_call_id=[^\s\"'\\]+")
URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'<>]+", re.IGNORECASE)
PATH = re.compile(r"(?<![\w.:/}-])(?:~|\.{1,2})?(?:/[\w.@+=,-]+){2,}/?")
USER_INFO = re.compile(r"://[^/\s:@]*:([^@/\s]+)@")

SHORTEST_SECRET = 8
"""A shorter value, such as `EMPTY` or `true`, guards nothing and may be an ordinary word of an answer."""
SECRET_VALUE = re.compile(rf"(?:Bearer )?[\w.~+/=:-]{{{SHORTEST_SECRET},}}")
WORD = re.compile(r"[A-Za-z]+")
"""Another's host or bucket called `server` or `data` is private as part of an address, and elsewhere a word of an answer."""
NOBODYS_HOSTS = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}  # noqa: S104 - names that are to be left alone
PUBLIC_HOSTS = {"huggingface.co", "github.com", "arxiv.org"}
NOBODYS_PATHS = {"/", "/tmp", "/usr", "/usr/local", "/opt", "/home", "/var", "/var/tmp", "/mnt", "/data"}  # noqa: S108


@dataclass(frozen=True, slots=True)
class Needle:
    """One value that is looked for in every file; `what` may be told, the value may not."""

    kind: Kind
    what: str
    value: str

    def forms(self) -> set[bytes]:
        """The value as it may stand in a file: as it is, escaped for JSON, quoted for a URL."""
        escaped = {json.dumps(self.value)[1:-1], json.dumps(self.value, ensure_ascii=False)[1:-1]}
        quoted = {quote(self.value, safe="")} if self.kind == "secret" else set()
        return {form.encode() for form in {self.value} | escaped | quoted}

    def pattern(self) -> bytes:
        words = b"|".join(re.escape(form) for form in sorted(self.forms(), key=len, reverse=True))
        if self.kind == "secret" or (self.kind == "url" and ":" in self.value and "://" not in self.value):
            return rb"(?:%s)" % words
        if self.kind == "path" and self.value.count("/") > 1:
            return rb"(?:%s)" % words
        if "://" in self.value:
            return rb"(?:%s)(?![\w-])" % words
        after = rb"(?![\w.-]*\w)" if self.kind == "path" else rb"(?![\w-])"
        return rb"(?:(?<![\w.-])|%s)(?:%s)%s" % (ESCAPED, words, after)


def needles(run_dir: Path, documents: Mapping[str, Any], token: str, key_env: str | None) -> list[Needle]:
    """Everything known to be private: of this machine, of this process, and what the run's own `documents` name."""
    found = [Needle("secret", "the Hub's token", token), *_secrets(key_env), *_hosts(), *_places(run_dir)]
    for name, document in documents.items():
        found += _secrets_in(document, name)
        for text in strings(document):
            found += _named_in(text, name)
    unique = {needle.value: needle for needle in reversed(found)}
    return sorted(unique.values(), key=lambda needle: len(needle.value), reverse=True)


def _secrets(key_env: str | None) -> Iterator[Needle]:
    for name, value in os.environ.items():
        known = SECRET_NAME.search(name) or name == key_env or name.startswith(SERVER_KEY_PREFIX)
        if known and len(value) >= SHORTEST_SECRET:
            yield Needle("secret", f"the value of ${name}", value)
        for password in USER_INFO.findall(value):
            if len(password) >= SHORTEST_SECRET:
                yield Needle("secret", f"the password in ${name}", password)


def _secrets_in(value: Any, document: str) -> Iterator[Needle]:
    """What stands under a key such as `judge_api_key`; `api_key_env` names a variable, and `eos_token` is `<|im_end|>`."""
    if isinstance(value, dict):
        for key, one in value.items():
            if isinstance(one, str) and SECRET_KEY.search(str(key)) and SECRET_VALUE.fullmatch(one):
                yield Needle("secret", f"{key} of {document}", one)
            else:
                yield from _secrets_in(one, document)
    elif isinstance(value, list):
        for one in value:
            yield from _secrets_in(one, document)


def _hosts() -> Iterator[Needle]:
    for name in {socket.gethostname(), os.uname().nodename} - NOBODYS_HOSTS:
        for each in {name, name.partition(".")[0]} - NOBODYS_HOSTS:
            yield Needle("host", "this machine's host name", each)


def _places(run_dir: Path) -> Iterator[Needle]:
    places: dict[str, Path] = {
        "the run folder": run_dir,
        "the home folder": Path.home(),
        "the working folder": Path.cwd(),
        "the checkout": Path(__file__).parents[3],
        "the output folder": paths.output_root(),
        "the state folder": paths.state_dir(),
        "the Python environment": Path(sys.prefix),
        "the Python installation": Path(sys.base_prefix),
    }
    for what, place in places.items():
        for form in {str(place.absolute()), str(place.resolve())} - NOBODYS_PATHS:
            yield Needle("path", what, form)


def _named_in(text: str, document: str) -> Iterator[Needle]:
    for url in URL.findall(text):
        where = urlsplit(url)
        if where.scheme == "file":
            yield Needle("path", f"a path of {document}", where.path)
            continue
        for what, place in (("an address", where.netloc), ("a host", where.hostname or "")):
            if place not in NOBODYS_HOSTS | PUBLIC_HOSTS:
                named = f"{where.scheme}://{place}" if WORD.fullmatch(place) else place
                yield Needle("url", f"{what} of {document}", named)
    rest = URL.sub(" ", text)
    whole = [rest] if re.fullmatch(r"(~|\.{1,2})?/\S*", rest) else []
    for path in {*(match.rstrip("/") for match in PATH.findall(rest)), *whole} - NOBODYS_PATHS:
        if path.count("/") > 1:
            yield Needle("path", f"a path of {document}", path)


def strings(value: Any) -> Iterator[str]:
    """Every text inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from strings(one)
