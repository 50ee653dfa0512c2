"""The app on Modal: what it is called, what it runs, and what it costs at most.

`deployments/modal_vllm.py` holds the one function that runs in the container. This module makes the app around it, from
the configuration that the command gives or, for `modal deploy`, that MODAL_EVAL_MODEL and MODAL_EVAL_BENCHMARK name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from modal_eval import paths
from modal_eval.checkpoints import resolve_model
from modal_eval.config.identity import file_sha256
from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import Overrides, RunConfig
from modal_eval.errors import ConfigError
from modal_eval.records import PreparedModel
from modal_eval.serving import modal_keys, vllm
from modal_eval.serving.prices import Price, estimate

if TYPE_CHECKING:
    import modal

VERSION = 1
"""Of what an app is. A change of the image or of `deployments/modal_vllm.py` raises it: old apps are then not shared."""
PREFIX = "modal-eval-"
NAME_LENGTH = 64
"""Modal's limit for the name of an app."""
FUNCTION = "serve"
PORT = 8000
TEMPLATE = PurePosixPath("/modal-eval/chat_template.jinja")
CUDA_IMAGE = "nvidia/cuda:13.0.2-devel-ubuntu24.04"
"""The CUDA of the locked vLLM, with the compiler that some kernels are built with when they are first used."""
PYTHON = "3.12"
CHECKPOINTS = PurePosixPath("/modal-eval/checkpoints")
CHECKPOINT_VOLUME = "modal-eval-checkpoints"
VOLUMES = {
    "/modal-eval/huggingface": "modal-eval-huggingface",
    "/modal-eval/vllm": "modal-eval-vllm",
    str(CHECKPOINTS): CHECKPOINT_VOLUME,
}
"""What a second start does not fetch or compile again, by its folder in the container."""
CONTAINER = {
    "HF_HOME": "/modal-eval/huggingface",
    "VLLM_CACHE_ROOT": "/modal-eval/vllm",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_XET_HIGH_PERFORMANCE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that makes one app differ from another."""

    model: str
    """As requests name it."""
    revision: str | None
    command: tuple[str, ...]
    packages: str
    """SHA-256 of `requirements/vllm.txt`: the image has the very packages that this machine's servers have."""
    gpu: str
    timeout_s: int
    startup_timeout_s: int
    scaledown_window_s: int
    max_inputs: int
    lifetime_s: int
    secrets: tuple[str, ...]
    template_sha256: str | None
    owner: str
    """Whose key opens it: two machines never share a server, and never stop each other's."""
    template: Path | None
    """Here; `TEMPLATE` in the container."""
    checkpoint: Path | None
    """Folder here that is uploaded under the name that the command gives it; `None` for a model of the Hub."""

    @property
    def name(self) -> str:
        """`modal-eval-ORG-MODEL-HASH`: equal for equal plans and for no others, within Modal's 64 characters."""
        content = {**asdict(self), "template": self.template is not None, "checkpoint": None, "version": VERSION}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        room = NAME_LENGTH - len(PREFIX) - len(digest) - 1
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", self.model)[:room].strip("-.")
        return f"{PREFIX}{slug}-{digest}"


def app_tags(model: str, holder: str, deadline: float, price: Price) -> dict[str, str]:
    """What an app says of itself on Modal: whose it is, who holds it, when anybody may stop it, and what GPUs it has."""
    return {
        "tool": "modal-eval", "owner": modal_keys.owner(), "model": tag(model), "holder": tag(holder),
        "deadline": f"{deadline:.0f}", "gpus": tag(f"{price.gpus}.{price.gpu}"),
    }  # fmt: skip


def tagged_price(text: str) -> Price:
    """The GPUs that a tag of `app_tags` speaks of, with the price that they are estimated at."""
    count, _, kind = text.partition(".")
    return estimate(kind, int(count)) if count.isdecimal() else Price()


def tag(text: str) -> str:
    """`text` within what Modal takes as the value of a tag."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63] or "-"


def plan(config: RunConfig, model: PreparedModel) -> Plan:
    """What `config` asks Modal for. Raises `ConfigError` for a setting that vLLM's command cannot have."""
    infra = config.infra
    template = TEMPLATE if model.chat_template else None
    place = str(CHECKPOINTS / checkpoint_name(model)) if model.path else model.model_id
    words = ["vllm", "serve", place, "--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 - behind Modal's own gate
    if not model.path:
        words += vllm.flag("revision", model.revision) + vllm.flag("tokenizer_revision", model.revision)
    words += vllm.settings(config, model.served_name, template)
    if config.vllm.replicas > 1:
        words += vllm.flag("data_parallel_size", config.vllm.replicas)
    return Plan(
        model.served_name, model.revision, tuple(words), file_sha256(vllm_lock()), infra.gpu, infra.timeout, infra.startup_timeout,
        infra.scaledown_window, infra.max_concurrent_inputs, infra.lifetime, tuple(infra.secrets),
        model.chat_template_sha256, modal_keys.owner(), model.chat_template, model.path,
    )  # fmt: skip


def checkpoint_name(model: PreparedModel) -> str:
    """What a checkpoint of this machine is called in the volume: its name, and the digest of what it holds."""
    return f"{tag(model.served_name)}-{(model.digest or '').removeprefix('sha256:')[:24]}"


def vllm_lock() -> Path:
    return paths.project_root() / "requirements" / "vllm.txt"


def build(wanted: Plan, serve: Callable[[], None], tags: dict[str, str]) -> modal.App:
    """The app of `wanted`: one container at most, none while nobody asks."""
    import modal

    app = modal.App(wanted.name, tags=tags)
    image = (
        modal.Image.from_registry(CUDA_IMAGE, add_python=PYTHON)
        .entrypoint([])
        .uv_pip_install(requirements=[str(vllm_lock())])
        .env(CONTAINER)
    )
    if wanted.template:
        image = image.add_local_file(wanted.template, str(TEMPLATE))
    secrets = [modal.Secret.from_name(name) for name in wanted.secrets]
    secrets.append(
        modal.Secret.from_dict(
            {
                "VLLM_API_KEY": modal_keys.key(wanted.name),  # by name in the environment, never in a command line
                "MODAL_EVAL_COMMAND": json.dumps(wanted.command),
                "MODAL_EVAL_LIFETIME_S": str(wanted.lifetime_s),
            }
        )
    )
    web = modal.web_server(PORT, startup_timeout=wanted.startup_timeout_s)(serve)
    app.function(
        name=FUNCTION,
        image=image,
        gpu=wanted.gpu,
        timeout=wanted.timeout_s,
        startup_timeout=wanted.startup_timeout_s,
        scaledown_window=wanted.scaledown_window_s,
        min_containers=0,
        max_containers=1,
        volumes={folder: modal.Volume.from_name(name, create_if_missing=True) for folder, name in VOLUMES.items()},
        secrets=secrets,
    )(modal.concurrent(max_inputs=wanted.max_inputs)(web))
    return app


_wanted: ContextVar[tuple[Plan, dict[str, str]] | None] = ContextVar("_wanted", default=None)
"""What `load_app` is loading the file for; `None` when Modal's own command loads it."""


def app_for(serve: Callable[[], None]) -> modal.App:
    """The app around `serve`, for whoever is loading `deployments/modal_vllm.py`."""
    if (given := _wanted.get()) is None:
        wanted = plan_from_environment()
        kind, _, count = wanted.gpu.partition(":")
        tags = app_tags(wanted.model, "deployed", time.time() + wanted.lifetime_s, Price(int(count or 1), kind))
        given = wanted, {**tags, "benchmark": tag(Path(os.environ["MODAL_EVAL_BENCHMARK"]).stem)}
    return build(given[0], serve, given[1])


def load_app(wanted: Plan, tags: dict[str, str]) -> modal.App:
    """Load `deployments/modal_vllm.py` for `wanted`, under the name that it has in the container."""
    path = paths.project_root() / "deployments" / "modal_vllm.py"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist, and a server on Modal is made from it; run from a checkout")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # Modal looks the function's module up by its name
    token = _wanted.set((wanted, tags))
    try:
        spec.loader.exec_module(module)
    finally:
        _wanted.reset(token)
    app: modal.App = module.app
    return app


def plan_from_environment() -> Plan:
    """What MODAL_EVAL_MODEL and MODAL_EVAL_BENCHMARK ask for. Raises `ConfigError` when one is not set."""
    given = {name: os.environ.get(name) for name in ("MODAL_EVAL_MODEL", "MODAL_EVAL_BENCHMARK")}
    if missing := [name for name, value in given.items() if not value]:
        raise ConfigError(
            f"{' and '.join(missing)} must say what to deploy: MODAL_EVAL_MODEL=org/model MODAL_EVAL_BENCHMARK=gsm8k "
            "modal deploy deployments/modal_vllm.py"
        )
    benchmark = load_benchmark(str(given["MODAL_EVAL_BENCHMARK"]))
    config = resolve(
        str(given["MODAL_EVAL_MODEL"]), benchmark, Overrides.model_validate({"infra": {"target": "modal"}})
    )
    wanted = plan(config, resolve_model(config))
    if wanted.checkpoint:
        raise ConfigError(
            f"MODAL_EVAL_MODEL={config.model} is on no Hub; `modal-eval deploy` uploads a checkpoint, `modal deploy` does not"
        )
    return wanted
