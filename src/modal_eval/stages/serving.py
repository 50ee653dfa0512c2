"""Deploy, proxy, teardown: what a run holds while it generates, and how it gives everything back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modal_eval import checkpoints, paths, serving
from modal_eval.errors import ModalEvalError
from modal_eval.proxy import Proxy, ProxySettings
from modal_eval.records import ServerHandle
from modal_eval.results.files import read_json
from modal_eval.results.progress import note_stage, stage_seconds, timed
from modal_eval.results.run_folder import Run, now
from modal_eval.stages.preparing import read_prepared

logger = logging.getLogger(__name__)

SERVER_FACTS_THAT_CHANGE_ANSWERS = ("max_model_len", "chat_template_sha256")


@dataclass
class Holding:
    """What this process holds for one run."""

    server: ServerHandle | None = None
    proxy: Proxy | None = None
    checkpoint: checkpoints.Hold | None = None
    """The model's files in the cache, which nobody removes meanwhile."""


_holdings: dict[Path, Holding] = {}
"""By run folder, so that teardown finds a server even when the stage that started it was cut off in the middle."""


def deploy(run_dir: Path, say: Callable[[str], None] = logger.info) -> ServerHandle:
    """Start the run's server, or check the endpoint, and return when it answers."""
    run = Run.load(run_dir)
    model, _ = read_prepared(run_dir)
    holding = _holdings.setdefault(run_dir, Holding())
    held: serving.HeldGpus | None = None

    def tell(text: str) -> None:
        nonlocal held
        say(text)
        note_stage(run_dir, "deploy", note=text)  # who watches the run sees what it waits for
        held = serving.held_gpus(run_dir) or held  # a server that does not come up takes its leases along

    try:
        with timed(run_dir, "deploy"):
            holding.checkpoint = holding.checkpoint or checkpoints.use(model)
            holding.server = serving.start_server(run.config, model, run_dir, say=tell)
            refuse_changed_server(run, holding.server)
    finally:
        note_held(run, serving.held_gpus(run_dir) or held or serving.HeldGpus(0, now()))
    run.update(
        app_name=holding.server.app,
        modal_url=holding.server.base_urls[0],
        server={"engine": holding.server.engine, **holding.server.facts},
    )
    return holding.server


def note_held(run: Run, held: serving.HeldGpus) -> None:
    """Add a server's GPUs to those that the run held, whether it came up or not; none at all ends what the last one counts."""
    starting_s = (datetime.now(UTC) - datetime.fromisoformat(held.since)).total_seconds()
    generated_s = stage_seconds(run.run_dir / paths.CHECKPOINT_META).get("generate", 0.0)
    before = read_json(run.run_dir / paths.RUN_CONFIG).get("held") or []
    run.update(held=[*before, {**asdict(held), "starting_s": round(starting_s, 3), "generated_s": generated_s}])


def refuse_changed_server(run: Run, server: ServerHandle) -> None:
    """Make what the server says of itself part of the folder's identity: an endpoint may be another model today."""
    facts = {key: server.facts.get(key) for key in SERVER_FACTS_THAT_CHANGE_ANSWERS}
    identity = run.identity() or {}
    if "server_facts" in identity:
        run.claim_identity({**identity, "server_facts": facts})
    else:
        run.set_identity({**identity, "server_facts": facts})


def start_proxy(run_dir: Path, server: ServerHandle | None) -> Proxy:
    """Put the proxy in front of `server`; without one it answers from the journal alone."""
    run = Run.load(run_dir)
    model, _ = read_prepared(run_dir)
    infra, evaluation = run.config.infra, run.config.eval
    holding = _holdings.setdefault(run_dir, Holding())
    holding.proxy = Proxy.start(
        ProxySettings(
            journal=run_dir / paths.JOURNAL,
            identity=run.identity() or {},
            upstreams=server.base_urls if server else (),
            model=server.model if server else model.served_name,
            api_key_env=server.api_key_env if server else None,
            max_in_flight=min(evaluation.max_concurrent, infra.max_concurrent_inputs),
            call_timeout_s=infra.timeout,
            silence_timeout_s=infra.silence_timeout or infra.timeout,
            outage_timeout_s=infra.outage_timeout,
            retries=evaluation.retries,
            log_path=paths.logs_dir(run_dir) / "proxy.log",
        )
    )
    return holding.proxy


def death_of(run_dir: Path) -> str | None:
    """Why generating cannot go on: the server or the proxy has died."""
    holding = _holdings.get(run_dir, Holding())
    if holding.server and (message := serving.server_exit(holding.server)):
        return message
    return holding.proxy.exit_message() if holding.proxy else None


def proxy_fault(stats: dict[str, Any]) -> str | None:
    """Why the proxy takes no further calls: a journal that cannot be written, a server that stays away."""
    if error := stats.get("journal_error"):
        return f"the journal cannot be written: {error}; free some space, then `modal-eval resume`"
    if outage := stats.get("outage"):
        return f"the server cannot be reached: {outage}; `modal-eval resume` goes on once it is back"
    return None


def teardown(run_dir: Path) -> None:
    """Stop the run's proxy and server, whatever state they are in.

    May be called twice: what could not be given back is still held then, and is tried again.
    """
    holding = _holdings.get(run_dir)
    if holding is None:
        return
    try:
        if holding.proxy:
            holding.proxy.stop()
    finally:
        try:
            if holding.server:
                serving.stop_server(holding.server)
                holding.server = None
        finally:
            if holding.checkpoint:
                holding.checkpoint.close()
    del _holdings[run_dir]


def teardown_all() -> None:
    """Stop what this process still holds, for the exit paths that run no `finally`."""
    for run_dir in list(_holdings):
        try:
            teardown(run_dir)
        except ModalEvalError:
            logger.exception("teardown of %s", run_dir)
