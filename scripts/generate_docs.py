"""Write the reference pages from the code: `docs/benchmark-yaml.md` and `docs/cli.md`.

Run `python scripts/generate_docs.py` after a change; a test compares the pages with what this makes.
"""

from __future__ import annotations

import io
import sys
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console

from modal_eval.cli.app import app
from modal_eval.config.models import BenchmarkConfig

DOCS = Path(__file__).resolve().parents[1] / "docs"

YAML_HEAD = """# Every key of a benchmark's YAML

Generated from `modal_eval/config/models.py`. A benchmark is one file in `benchmark_configs/`, or any file given as
`-b path/to/file.yaml`. Write only what differs from the defaults. Each key of a section is also an option of
`modal-eval run`, such as `--vllm.max_model_len=8192`; keys of `env_args` are given as `--env.KEY=VALUE`. The command
line wins over the YAML, key by key; lists are replaced whole. A key that does not exist is refused, with the nearest
one that does.
"""

CLI_HEAD = """# The commands

Generated from the code. Exit codes: 0 done, 1 failed, 2 wrong usage (nothing was started), 3 finished but incomplete,
130 interrupted. `--json` puts data on stdout and talk on stderr.
"""


def yaml_page() -> str:
    parts = [YAML_HEAD]
    sections = []
    rows = ["## Top level", "", "| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in BenchmarkConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((name, field.annotation))
        elif name != "name":
            rows.append(row(name, field))
    parts.append("\n".join(rows))
    for name, model in sections:
        lines = [
            f"## `{name}`",
            "",
            (model.__doc__ or "").strip(),
            "",
            "| key | type | default | meaning |",
            "|---|---|---|---|",
        ]
        lines += [row(key, field) for key, field in model.model_fields.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def row(name: str, field: Any) -> str:
    default = "required" if field.default is PydanticUndefined else f"`{yaml_value(field.default)}`"
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {type_text(field.annotation)} | {default} | {meaning} |"


def yaml_value(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if not isinstance(value, list | dict)
        else str(value)
    )


def type_text(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return type_text(typing.get_args(annotation)[0])
    arguments = typing.get_args(annotation)
    if arguments and typing.get_origin(annotation) not in (list, dict):
        return " or ".join(type_text(argument) for argument in arguments)
    names = {str: "text", int: "integer", float: "number", bool: "true/false", list: "list", dict: "keys and values"}
    return names.get(typing.get_origin(annotation) or annotation, str(annotation))


def cli_page() -> str:
    parts = [CLI_HEAD, help_block([])]
    parts += [f"## `modal-eval {name}`\n\n{help_block([name])}" for name in COMMANDS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


COMMANDS = ("run", "resume", "score", "runs", "benchmarks", "status", "stop")


def help_block(tokens: list[str]) -> str:
    buffer = io.StringIO()
    app.help_print(tokens, console=Console(file=buffer, width=110, force_terminal=False, color_system=None))
    return "```text\n" + "\n".join(line.rstrip() for line in buffer.getvalue().strip().splitlines()) + "\n```"


PAGES = {"benchmark-yaml.md": yaml_page, "cli.md": cli_page}


def main() -> None:
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
        sys.stdout.write(f"docs/{name}\n")


if __name__ == "__main__":
    main()
