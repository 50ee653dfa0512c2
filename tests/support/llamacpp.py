"""A real llama.cpp server of a real small model, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from modal_eval import serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides

MODEL = "SmolLM2-135M-Instruct"


@contextmanager
def serving_llamacpp(folder: Path, at_once: int, threads: int, **vllm: Any) -> Iterator[str]:
    """Its base URL. It answers `at_once` calls at a time; its lease and log stand in `folder`."""
    asked = Overrides(
        infra={"engine": "llamacpp"}, eval={"max_concurrent": at_once}, vllm={"extra_args": {"threads": threads}, **vllm}
    )  # fmt: skip
    config = resolve(MODEL, BenchmarkConfig(env_id="gsm8k"), asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODAL_EVAL_STATE_DIR", str(folder / "state"))
        handle = serving.start_server(config, resolve_model(config), folder)
        try:
            yield handle.base_urls[0]
        finally:
            serving.stop_server(handle)
