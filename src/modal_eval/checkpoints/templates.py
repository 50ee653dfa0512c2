"""Which chat template an answer was asked with: the model's own, else the benchmark's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modal_eval import paths
from modal_eval.config.models import BenchmarkConfig
from modal_eval.errors import CheckpointError

Source = Literal["server", "tokenizer_config.json", "chat_template.jinja", "gguf", "benchmark", "none"]


@dataclass(frozen=True, slots=True)
class Template:
    path: Path | None
    """File to hand to the engine; `None` where the engine finds the template by itself."""
    source: Source
    sha256: str | None


def folder_template(folder: Path, fallback: str | None) -> Template:
    """`tokenizer_config.json`, then `chat_template.jinja`, then the benchmark's `templates/{fallback}.jinja`.

    Where a folder has both of its own, transformers would take the second: the first is then handed over as a file, so
    that what is recorded is what is used.
    """
    own = folder / "chat_template.jinja"
    if held := _tokenizer_config(folder).get("chat_template"):
        text = held if isinstance(held, str) else json.dumps(held, sort_keys=True)
        ambiguous = isinstance(held, str) and own.is_file() and _text(own) != held
        return Template(_kept(held) if ambiguous else None, "tokenizer_config.json", _sha256(text))
    if own.is_file():
        return Template(own, "chat_template.jinja", _sha256(_text(own)))
    return _fallback(fallback)


def gguf_template(held: Any, fallback: str | None) -> Template:
    """The template `held` in a GGUF file's metadata, then the benchmark's."""
    return Template(None, "gguf", _sha256(str(held))) if held else _fallback(fallback)


def asks_as_chat(config: BenchmarkConfig) -> bool:
    """Whether the benchmark's requests are chats, which no model answers without a template.

    EvalPlus's `prompt_format: base` and lm-eval without `apply_chat_template` send plain text; OLMES makes its prompts by
    itself.
    """
    match config.eval.harness:
        case "evalplus":
            return bool(config.env_args.get("prompt_format", "chat") != "base")
        case "lm_eval":
            return bool(config.env_args.get("apply_chat_template", False))
        case "olmes":
            return False
        case _:
            return True


def refuse_chat_without_template(config: BenchmarkConfig, template: Template, model: str) -> None:
    """Raise `CheckpointError` for a base model on a chat benchmark, before it costs a server to find out."""
    if template.source == "none" and asks_as_chat(config):
        raise CheckpointError(
            f"{model} brings no chat template (a base model has none) and {config.name or config.env_id} asks as a chat; "
            "give the benchmark's YAML a chat_template: base, code, math or think, or take the model's instruct version"
        )


def _fallback(name: str | None) -> Template:
    if name is None:
        return Template(None, "none", None)
    shipped = paths.project_root() / "benchmark_configs" / "templates" / f"{name}.jinja"
    return Template(shipped, "benchmark", _sha256(_text(shipped)))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is broken ({error}); copy it again") from error
    return found if isinstance(found, dict) else {}


def _kept(text: str) -> Path:
    path = paths.state_dir() / "templates" / f"{_sha256(text)}.jinja"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return path


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")  # as it is: a template's line ends are part of it


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
