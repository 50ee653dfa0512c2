"""The small, frozen records that travel between stages and stand on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

Row = dict[str, Any]
"""One line of `results.jsonl`; its keys are documented in `docs/files.md`."""

SERVER_KEY_PREFIX = "MODAL_EVAL_KEY_"
"""Of the environment variables that hold the keys of our servers: for the proxy, and for no harness."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds a server and how to stop it; on disk before anybody waits for the server."""

    lease_id: str
    kind: Literal["process", "keeper", "modal"]
    """How the server is stopped: `process` is a process group on this host, `keeper` a process here that has servers of its
    own and ends them when no lease of theirs is live, `modal` an app on Modal."""
    run_dir: str
    host: str
    boot_id: str
    """Kernel boot id: after a reboot no pid of the lease means anything."""
    holder_pid: int
    holder_started: float
    """Start time of the holder in clock ticks since boot, so that a reused pid is not taken for the holder."""
    server_pid: int
    """Leader of the server's own process group; 0 until it is started."""
    server_started: float
    created_at: str
    """ISO 8601, UTC."""
    deadline: float | None
    """Unix time after which the server may be stopped by anybody; `None` lives as long as its holder."""
    model: str = ""
    url: str = ""
    app: str = ""
    """Name of a server that runs may share, each with a lease of its own: of the app on Modal, or of what a keeper has
    here."""
    benchmark: str = ""
    """The benchmark whose settings it was deployed with, without a run."""
    since: str = ""
    """When the server began, where it is older than the lease; ISO 8601, UTC."""
    gpus: int = 0
    """GPUs of the server that are ours or paid by us."""
    gpu: str = ""
    """Their type, as Modal names it."""
    hour_price: float | None = None
    """Price of all of them for an hour: what `infra.gpu_hour_price` says, else for Modal's an estimate."""
    price_is_estimate: bool = False
    keep_s: float = 0.0
    """For so long the server outlives a run that gives it back; one that a dead run left behind is stopped."""
    kept: bool = False
    """Given back and kept: it lives until the deadline, with or without its holder."""
    account: str = ""
    """Under which login and environment it is on Modal, as a digest of the token's id; empty where nobody noted it."""


@dataclass(frozen=True, slots=True)
class ServerHandle:
    """A server that is ready: what the proxy needs to reach it and teardown needs to end it."""

    base_urls: tuple[str, ...]
    """OpenAI-compatible bases, each ending in `/v1`; one per replica."""
    model: str
    """The model name the server answers to."""
    engine: Literal["endpoint", "vllm", "llamacpp"]
    lease_id: str | None = None
    """Lease of the first replica; `None` for an endpoint that is not ours to stop."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; never the key."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the server says of itself: `version`, `model_root`, `max_model_len`, `chat_template_sha256`, where known."""
    app: str | None = None
    """Name of its app on Modal, if it is there."""
    kept: str | None = None
    """Name under which a keeper has it on this machine; `None` for a server that ends with its run."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        return cls(**{**data, "base_urls": tuple(data["base_urls"])})


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model that an engine can load."""

    model_id: str
    """What the user typed, without the revision."""
    source: Literal["endpoint", "folder", "gguf", "package", "hub", "s3"]
    path: Path | None
    """Folder or GGUF file to load; `None` when the server already has it."""
    served_name: str
    """The model name that requests carry."""
    revision: str | None
    """Commit of a Hub model; of one on S3 `sha256:…` over its objects' names, sizes, ETags and checksums; else `None`."""
    digest: str | None
    """`sha256:…` over the files' names, sizes and headers; `None` for an endpoint."""
    chat_template: Path | None
    """Template file to pass to the engine; `None` when the model brings its own."""
    chat_template_source: Literal["server", "tokenizer_config.json", "chat_template.jinja", "gguf", "benchmark", "none"]
    chat_template_sha256: str | None
    step: int | None = None
    stage: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        data = json.loads(text)
        paths = {key: Path(data[key]) if data[key] else None for key in ("path", "chat_template")}
        return cls(**{**data, **paths})


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `generate` hands to `score` and the CLI shows: counts, no rows."""

    run_dir: Path
    total_rollouts: int
    finished_rollouts: int
    unscored: int
