"""Draw what a command leaves on a terminal: run it for real under a pty and save its last screen as an SVG.

    python scripts/picture.py docs/images/demo.svg -- modal-eval run -m SmolLM2-135M-Instruct -b demo

The command runs with this interpreter's console scripts first on its path. Exits with the command's code, and then
leaves no picture unless that is 0: a picture of a failure is no picture of the product.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

FONTS_FROM_THE_NET = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)
"""An SVG inside a page may load nothing; the reader's own monospaced font is taken."""


def screen(command: list[str], columns: int) -> tuple[str, int]:
    """Everything `command` wrote to a terminal of so many columns, and its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", COLUMNS=str(columns))
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        try:
            os.execvp(command[0], command)  # noqa: S606 - the child is the command from here on
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
            os._exit(127)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    written = io.BytesIO()
    while block := read(terminal):
        written.write(block)
    return written.getvalue().decode(errors="replace"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read(terminal: int) -> bytes:
    """The next output, or nothing at the end, which Linux reports as an error of the pty."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def draw(command: list[str], written: str, columns: int) -> str:
    """The screen as SVG; a line that was drawn over and over counts as it was last."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "green"), (shlex.join(command), "bold")))
    for line in written.replace("\r\n", "\n").rstrip().split("\n"):
        console.print(Text.from_ansi(line.rsplit("\r", 1)[-1]), soft_wrap=True)
    return console.export_svg(
        title="modal-eval", code_format=FONTS_FROM_THE_NET.sub("", CONSOLE_SVG_FORMAT), unique_id="picture"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--columns", type=int, default=100)
    parser.add_argument("command", nargs="+", help="after --")
    given = parser.parse_args()
    written, code = screen(given.command, given.columns)
    if code:
        sys.exit(f"{shlex.join(given.command)} ended with {code}; no picture was made:\n{written}")
    given.file.parent.mkdir(parents=True, exist_ok=True)
    given.file.write_text(draw(given.command, written, given.columns), encoding="utf-8")


if __name__ == "__main__":
    main()
