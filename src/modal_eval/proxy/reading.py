"""What a journal holds, seen from outside while no proxy is needed."""

from __future__ import annotations

import re
from pathlib import Path

from modal_eval.proxy.lines import MAX_HEAD

_ANSWERED = re.compile(rb'"kind":"answer",.*?"tag":"([^"\\]*)"')


def answered_rollouts(journal: Path) -> set[str]:
    """The rollouts, as `example/rollout`, that have at least one finished call."""
    if not journal.is_file():
        return set()
    with journal.open("rb") as file:
        heads = (_ANSWERED.search(line[:MAX_HEAD]) for line in file if line.endswith(b"\n"))
        return {head.group(1).decode("ascii") for head in heads if head}
