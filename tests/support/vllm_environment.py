"""An environment that has nothing but a vLLM, which is the scripted upstream: for nodes whose GPUs are pretended, too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
while [ $# -gt 0 ]; do case "$1" in --port) port="$2";; --served-model-name) model="$2";; esac; shift; done
export PYTHONPATH='{root}'
exec '{python}' -m tests.support.upstream --port-file "$0-$port.json" --port "$port" --model "$model" --script '{script}'
"""


def vllm_environment(folder: Path, **behaviour: Any) -> Path:
    """Make it in `folder`, for `infra.environment`; its servers answer with `behaviour`."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    script = json.dumps({"default": behaviour})
    python.write_text(PYTHON.format(root=ROOT, python=sys.executable, script=script))
    python.chmod(0o755)
    return folder
