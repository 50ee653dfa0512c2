"""A copy of a run's files without what is private, and a last look before anything is sent.

Answers of a model are touched only where they hold a value of `private.needles`: an address or a path that a model
made up is part of its answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from modal_eval import paths
from modal_eval.errors import HubError
from modal_eval.hub.private import (
    PATH,
    PUBLIC_HOSTS,
    RESULT_MARK,
    RESULT_URL,
    SECRET_FORMS,
    SECRET_MARKS,
    URL,
    Needle,
    needles,
    strings,
)

DOCUMENTS = (paths.RUN_CONFIG, paths.CHECKPOINT_META, paths.METADATA)
"""JSON files of our own: every path and every address in them goes."""
STREAMS = (paths.JOURNAL, paths.RESULTS)
"""JSON lines with answers of the model."""
BLOCK = 1 << 20
PLACEHOLDER = {"secret": b"{secret}", "path": b"{path}", "host": b"{host}", "url": b"{url}"}


@dataclass(frozen=True, slots=True)
class Sanitized:
    """The copy: its files by name, its summary, and how many values were taken out."""

    files: dict[str, Path]
    metadata: dict[str, Any]
    replaced: int
    scrubber: Scrubber

    def refuse_leaks(self, texts: Mapping[str, str]) -> None:
        """Raise `HubError` when a private value stands in one of `texts`, which go along with the files."""
        for name, text in texts.items():
            self.scrubber.refuse(name, text.encode())


def sanitized_copy(run_dir: Path, folder: Path, *, token: str, key_env: str | None) -> Sanitized:
    """Write the run's documented files into `folder`, without what is private.

    Logs stay here: they quote servers, paths and the machine on every line.
    """
    present = [name for name in (*DOCUMENTS, *STREAMS) if (run_dir / name).is_file()]
    if paths.METADATA not in present:
        error = HubError(
            f"{run_dir} has no {paths.METADATA}: the run has no score yet; `modal-eval resume {run_dir}` finishes it"
        )
        error.retryable = False
        raise error
    documents = {name: json.loads((run_dir / name).read_text("utf-8")) for name in DOCUMENTS if name in present}
    scrubber = Scrubber(needles(run_dir, documents, token, key_env))
    files = {name: folder / name for name in present}
    for name in present:
        if name in documents:
            shown = json.dumps(_without_places(documents[name]), indent=2, ensure_ascii=False)
            files[name].write_bytes(scrubber.scrub(shown.encode()) + b"\n")
        else:
            scrubber.scrub_file(run_dir / name, files[name])
        scrubber.refuse_file(name, files[name])
    metadata = json.loads(files[paths.METADATA].read_bytes())
    hidden = sum(_without_places(text) != text for document in documents.values() for text in strings(document))
    return Sanitized(files, metadata, scrubber.replaced + hidden, scrubber)


class Scrubber:
    """Replaces private values by a word that says what stood there, and refuses a text that still has one."""

    def __init__(self, private: list[Needle]) -> None:
        self.replaced = 0
        self._needles = [(needle, needle.forms(), re.compile(needle.pattern())) for needle in private]
        kinds = [(kind, [n.pattern() for n in private if n.kind == kind]) for kind in PLACEHOLDER]
        self._patterns = [(PLACEHOLDER[kind], re.compile(b"|".join(found))) for kind, found in kinds if found]

    def scrub(self, text: bytes) -> bytes:
        # A plain search is a hundred times faster than the patterns, and most blocks hold nothing private.
        patterns = self._patterns if any(form in text for _, forms, _ in self._needles for form in forms) else []
        if any(mark in text for mark in SECRET_MARKS):
            patterns = [(PLACEHOLDER["secret"], SECRET_FORMS), *patterns]
        if RESULT_MARK in text:
            patterns = [(PLACEHOLDER["url"], RESULT_URL), *patterns]
        for placeholder, pattern in patterns:
            text, count = pattern.subn(placeholder, text)
            self.replaced += count
        return text

    def scrub_file(self, source: Path, target: Path) -> None:
        """Copy block by block, so that a journal of any length takes the same memory."""
        with source.open("rb") as lines, target.open("wb") as file:
            while block := lines.readlines(BLOCK):
                file.write(self.scrub(b"".join(block)))

    def refuse_file(self, name: str, path: Path) -> None:
        with path.open("rb") as lines:
            while block := lines.readlines(BLOCK):
                self.refuse(name, b"".join(block))

    def refuse(self, name: str, text: bytes) -> None:
        """Raise `HubError` naming the file and what stands in it, never the value."""
        for needle, forms, pattern in self._needles:
            if any(form in text for form in forms) and pattern.search(text):
                raise _refusal(name, needle.what)
        if any(mark in text for mark in SECRET_MARKS) and SECRET_FORMS.search(text):
            raise _refusal(name, "something with the form of a key")


def _refusal(name: str, what: str) -> HubError:
    error = HubError(f"not pushed: {name} holds {what}; take it out there, or rename what brings it in, and push again")
    error.retryable = False
    return error


def _without_places(value: Any) -> Any:
    """A document of ours with every address and path in it taken out; a path keeps its last name."""
    if isinstance(value, dict):
        return {_without_places(key): _without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(one) for one in value]
    if not isinstance(value, str):
        return value
    text = URL.sub(lambda match: match.group() if _is_public(match.group()) else "{url}", value)
    if "://" in text:
        return text
    if re.fullmatch(r"(~|\.{1,2})?/\S*", text):
        return _last_name(text)
    return PATH.sub(lambda match: _last_name(match.group()), text)


def _is_public(url: str) -> bool:
    return urlsplit(url).netloc in PUBLIC_HOSTS


def _last_name(path: str) -> str:
    return f"{{path}}/{PurePosixPath(path).name}"
