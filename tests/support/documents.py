"""Reads Markdown as its reader does: files to make, commands to type, links to follow.

A fenced block that stands under a line such as `` `environments/capitals.py`: `` is a file of that name. A line of a
`console` block that begins with `$ ` is a command; a comment behind it, `# exit 2`, says how it has to end.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_NAME = re.compile(r"`([^`\n]+)`:\n\n\Z")
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
ENDING = re.compile(r"\s+# exit (\d+)$")


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    file: str | None
    """Name of the file that the block is, if it is one."""


@dataclass(frozen=True)
class Command:
    words: list[str]
    exit_code: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        name = FILE_NAME.search(text, 0, fence.start())
        found.append(Block(fence.group(1), fence.group(2), name.group(1) if name else None))
    return found


def commands(block: Block) -> list[Command]:
    found = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            ending = ENDING.search(line)
            typed = line[2 : ending.start()] if ending else line[2:]
            found.append(Command(shlex.split(typed), int(ending.group(1)) if ending else 0))
    return found


def links(page: Path) -> list[str]:
    """Targets of links and pictures, less those in code."""
    return LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
