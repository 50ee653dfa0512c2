"""Server processes of this machine, one a replica: start, ready, look after, end. Whoever starts them has to stay."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import httpx

from modal_eval.config.models import RunConfig
from modal_eval.errors import ServerError
from modal_eval.gpus import GpuLease
from modal_eval.processes import OwnedProcess, free_port, last_lines, masked
from modal_eval.records import Lease, PreparedModel
from modal_eval.serving import llamacpp, node, vllm
from modal_eval.serving.endpoint import server_facts
from modal_eval.serving.leases import drop_lease, note_server, take_lease
from modal_eval.serving.prices import price_of

logger = logging.getLogger(__name__)

POLL_S = 0.2
STOP_GRACE_S = 10.0


class Engine(Protocol):
    """What a module of this folder offers for the server that it knows."""

    def environment(self, config: RunConfig, *, say: Callable[[str], None]) -> Path: ...

    def command(self, python: Path, config: RunConfig, model: PreparedModel, port: int) -> list[str]: ...

    def variables(self, python: Path, config: RunConfig, number: int) -> dict[str, str]: ...


def engine_of(config: RunConfig) -> Engine:
    module: ModuleType = llamacpp if config.infra.engine == "llamacpp" else vllm
    return cast(Engine, module)


@dataclass(frozen=True)
class Owner:
    """Whose the replicas are, as their leases say."""

    lease_id: str
    run: str
    """What others are told who wait for the same GPUs."""
    logs: Path
    run_dir: Path | None = None
    app: str = ""
    """Name of the server that a keeper has; empty for a run's own."""


@dataclass
class Replica:
    """One server process of ours."""

    process: OwnedProcess
    lease: Lease
    url: str
    log: Path
    launch: Callable[[], tuple[OwnedProcess, Lease]]
    """Starts it again, at the same URL and on the same GPUs."""
    gpus: GpuLease | None = None
    on_node: bool = False
    restarts_left: int = 0

    def restart(self) -> None:
        """Start it again after its death; whether it comes up is for the proxy to see."""
        self.restarts_left -= 1
        drop_lease(self.lease)
        self.process, self.lease = self.launch()

    def death(self) -> str | None:
        """What to tell when the process has ended by itself."""
        if (code := self.process.poll()) is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
        return f"the model server (pid {self.process.pid}) {how}; the end of {self.log}:\n{last_lines(self.log)}"


def start(
    config: RunConfig, model: PreparedModel, owner: Owner, *, say: Callable[[str], None]
) -> tuple[list[Replica], dict[str, Any]]:
    """Start every replica and return them with the server's facts once all answer.

    Raises `ServerError` with a replica's last words when it dies or stays silent beyond `infra.startup_timeout`; then no
    process and no lease is left. Raises `GpuError` as `node.lease_gpus` does.
    """
    engine = engine_of(config)
    python = engine.environment(config, say=say)
    replicas: list[Replica] = []
    parts = node.lease_gpus(config, model, owner.run, say=say)
    try:
        for number, gpus in enumerate(parts):
            replicas.append(_launch(engine, python, config, model, owner, number, gpus))
            say(f"{config.infra.engine} is starting (pid {replicas[-1].process.pid}); its log is {replicas[-1].log}")
        deadline = time.monotonic() + config.infra.startup_timeout
        for replica in replicas:
            _wait_ready(replica, deadline, config.infra.startup_timeout)
        facts = server_facts(replicas[0].url, model.served_name)
    except BaseException:
        end(replicas)
        node.release(parts)
        raise
    return replicas, facts


def _launch(
    engine: Engine,
    python: Path,
    config: RunConfig,
    model: PreparedModel,
    owner: Owner,
    number: int,
    gpus: GpuLease | None,
) -> Replica:
    """Start replica `number` under a lease of its own, which is on disk first, and on its GPUs."""
    port = free_port()
    command = engine.command(python, config, model, port)
    variables = {**engine.variables(python, config, number), **(gpus.variables if gpus else {})}
    url, log = f"http://127.0.0.1:{port}", log_path(owner.logs, config.infra.engine, number)

    def launch() -> tuple[OwnedProcess, Lease]:
        logger.info("starting %s", masked(command))
        lease = take_lease(
            owner.run_dir, model.model_id, f"{owner.lease_id}-{number}" if number else owner.lease_id, app=owner.app,
            price=price_of(config, node.gpus_of(config, gpus)),
        )  # fmt: skip
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            process = OwnedProcess.start(
                command, log_path=log, env=variables, grace_s=STOP_GRACE_S, hold_fds=gpus.fds if gpus else ()
            )
        except OSError as error:
            drop_lease(lease)
            raise ServerError(f"the server's program cannot be started: {error}") from error
        except BaseException:
            drop_lease(lease)
            raise
        return process, note_server(lease, process.pid, process.started, url)

    process, lease = launch()
    on_node = config.infra.target == "node"
    return Replica(process, lease, url, log, launch, gpus, on_node, config.infra.max_restarts if on_node else 0)


def log_path(folder: Path, engine: str, number: int) -> Path:
    return folder / (f"{engine}-{number}.log" if number else f"{engine}.log")


def _wait_ready(replica: Replica, deadline: float, limit_s: float) -> None:
    """Ask first whether the process is dead, then whether it is up."""
    with httpx.Client(timeout=5) as client:
        while time.monotonic() < deadline:
            if death := replica.death():
                raise ServerError(death)
            if _answers(client, f"{replica.url}/health"):
                return
            time.sleep(POLL_S)
    raise ServerError(
        f"the model server did not answer within infra.startup_timeout={limit_s:g} s and was stopped; raise the limit, or "
        f"see the end of {replica.log}:\n{last_lines(replica.log)}"
    )


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def look_after(replicas: list[Replica]) -> str | None:
    """Restart what has died and may be restarted; the words of a dead one when that leaves too few.

    On a node one that lives is enough; anywhere else one dead replica is a dead server.
    """
    last_words = None
    lives = 0
    for replica in replicas:
        if (death := replica.death()) is None:
            lives += 1
        elif replica.restarts_left > 0:
            logger.warning("%s\nit is started again, %d more times at most", death, replica.restarts_left - 1)
            replica.restart()
            lives += 1
        else:
            last_words = death
    return None if lives and replicas[0].on_node else last_words


def end(replicas: list[Replica]) -> None:
    """End all of them, with their leases and GPUs."""
    for replica in replicas:  # all at once, so that eight take no longer than one
        if replica.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(replica.process.pid, signal.SIGTERM)
    with contextlib.ExitStack() as stack:  # one that cannot be ended keeps no other alive
        for replica in replicas:
            if replica.gpus:
                stack.callback(replica.gpus.release)
            stack.callback(drop_lease, replica.lease)
            stack.callback(replica.process.stop)
