"""An account on the stand-in for Modal: what a command needs to be its owner, and what has happened in it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modal_eval.environments import ensure_environment
from modal_eval.processes import OwnedProcess
from tests.support.processes import Mark

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
START_S = 60.0


@dataclass
class Account:
    url: str
    log: Path
    python: Path
    """Of an environment with Modal's package and without ours."""
    home: Path
    pid: int

    @property
    def variables(self) -> dict[str, str]:
        return {
            "MODAL_SERVER_URL": self.url, "MODAL_TOKEN_ID": "ak-test", "MODAL_TOKEN_SECRET": "as-test",
            "MODAL_CONFIG_PATH": str(self.home / "modal.toml"),
        }  # fmt: skip

    def events(self, kind: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        assert [event for event in found if event["event"] == "unimplemented"] == []
        return [event for event in found if event["event"] == kind]


@contextmanager
def account(folder: Path, *options: str) -> Iterator[Account]:
    """Serve the stand-in with `options` of `modal_server.py`; its containers end with it."""
    mark = Mark()
    python = ensure_environment("verifiers-legacy")
    folder.mkdir(parents=True, exist_ok=True)
    port, log = folder / "port", folder / "events.jsonl"
    server = OwnedProcess.start(
        [str(python), str(SUPPORT / "modal_server.py"), str(port), str(log), *options],
        log_path=folder / "server.log", env=mark.env,
    )  # fmt: skip
    deadline = time.monotonic() + START_S
    try:
        while not port.is_file():
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the stand-in did not start in time"
            time.sleep(0.02)
        yield Account(f"http://127.0.0.1:{port.read_text()}", log, python, folder, server.pid)
    finally:
        server.stop()
    assert mark.wait_until_gone() == {}


BROKEN = ("--quantization", "none-that-fits")
"""Words of a command with which the `vllm` of our containers ends at once, as it does for a model that does not fit."""

SILENT = ("--quantization", "none-that-ends")
"""Words with which it never listens."""


def container_programs(folder: Path, model: str, **behaviour: Any) -> Path:
    """A folder with a `vllm` for the containers: the scripted upstream, which serves `model` to whoever has the key."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "vllm"
    script.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" > "$STAND_IN_FOLDER/command"
case "$*" in *"{" ".join(BROKEN)}"*) echo 'ValueError: No available memory for the cache blocks' >&2; exit 1;;
  *"{" ".join(SILENT)}"*) exec sleep 600;;
esac
echo "vLLM has the secret: $(test -n "$VLLM_API_KEY" && echo yes)"
export UPSTREAM_API_KEY="$VLLM_API_KEY" PYTHONPATH='{ROOT}'
exec '{sys.executable}' -m tests.support.upstream --port-file "$STAND_IN_FOLDER/place.json" --model '{model}' \\
  --script '{json.dumps({"default": behaviour})}'
"""
    )
    script.chmod(0o755)
    return folder


MODEL = "org/tiny-step40"
COMMIT = "c0ffee" * 6 + "c0ff"
FILES = {
    "config.json": b"{}",
    "tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"}).encode(),
    "model.safetensors": b"weights that nobody on this side needs",
}
"""A model on the Hub, as far as this side looks at it."""
HIDDEN = ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "MODAL_ENVIRONMENT", "MODAL_PROFILE", "HF_TOKEN")
"""Variables of whoever runs the tests that would reach past the stand-in."""


@contextmanager
def account_with_vllm(folder: Path, *options: str, **behaviour: Any) -> Iterator[Account]:
    """An account with the secret `huggingface`, whose containers serve `MODEL` with `behaviour`."""
    programs = container_programs(folder / "programs", MODEL, **behaviour)
    with account(folder, "--programs", str(programs), "--secret", "huggingface", *options) as served:
        yield served
