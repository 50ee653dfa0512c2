"""Which of the things that lm-eval's filters make of an answer may vote among the samples of an example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HANDS_ON = "none"
"""The filter of tasks that look for the answer later, if at all: what it gives is the whole text."""
NOT_FOUND = "[invalid]"
"""What lm-eval's regular expressions give where they match nothing."""


def extracted(filtered: Mapping[str, Any], metric: str | None) -> str | None:
    """What the filter of the reward's metric (`exact_match,flexible-extract`) found, empty where it found nothing.

    `None` where that filter looks for no answer, and for documents with several requests, such as multiple choice.
    """
    name = (metric or "").rpartition(",")[2]
    found = filtered.get(name)
    if name == HANDS_ON or not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str):
        return None
    return "" if found[0] == NOT_FOUND else found[0]
