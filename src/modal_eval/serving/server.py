"""Start → ready → stop, the same for every kind of server."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from modal_eval import paths
from modal_eval.config.models import RunConfig
from modal_eval.errors import ServerError
from modal_eval.gpus import GpuLease
from modal_eval.processes import OwnedProcess, free_port, last_lines, masked
from modal_eval.records import Lease, PreparedModel, ServerHandle
from modal_eval.serving import llamacpp, modal_app, modal_servers, node, vllm
from modal_eval.serving.ending import stop_lease, sweep_dead
from modal_eval.serving.endpoint import check_endpoint, server_facts
from modal_eval.serving.leases import (
    drop_lease,
    family,
    new_lease_id,
    note_server,
    price_an_hour,
    server_alive,
    take_lease,
)

logger = logging.getLogger(__name__)

POLL_S = 0.2
STOP_GRACE_S = 10.0


class Engine(Protocol):
    """What a module of this folder offers for the server that it knows."""

    def environment(self, config: RunConfig, *, say: Callable[[str], None]) -> Path: ...

    def command(self, python: Path, config: RunConfig, model: PreparedModel, port: int) -> list[str]: ...

    def variables(self, python: Path, config: RunConfig, number: int) -> dict[str, str]: ...


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


_replicas: dict[str, list[Replica]] = {}
"""By the handle's lease id: a server stops with this process, so this process has to keep it."""


def start_server(
    config: RunConfig, model: PreparedModel, run_dir: Path, *, say: Callable[[str], None] = logger.info
) -> ServerHandle:
    """Start the server that `config` asks for and return once it answers.

    First ends what dead runs left on this machine. Raises `ServerError` with the server's last words when it dies or
    stays silent beyond `infra.startup_timeout`; then no process and no lease is left.
    """
    wanted = modal_app.plan(config, model) if config.infra.target == "modal" else None
    for lease in sweep_dead(spare=wanted.name if wanted else ""):
        say(f"ended a server that a dead run left behind ({lease.app or f'pid {lease.server_pid}'}, {lease.run_dir})")
    if wanted:
        return modal_servers.start(config, model, wanted, run_dir, say=say)
    if config.infra.target == "endpoint":
        return check_endpoint(config, model, say=say)
    engine: Engine = llamacpp if config.infra.engine == "llamacpp" else vllm
    python = engine.environment(config, say=say)
    lease_id = new_lease_id()
    replicas: list[Replica] = []
    parts = node.lease_gpus(config, model, run_dir, say=say)
    try:
        for number, gpus in enumerate(parts):
            replicas.append(_launch(engine, python, config, model, run_dir, lease_id, number, gpus))
            say(f"{config.infra.engine} is starting (pid {replicas[-1].process.pid}); its log is {replicas[-1].log}")
        deadline = time.monotonic() + config.infra.startup_timeout
        for replica in replicas:
            _wait_ready(replica, deadline, config.infra.startup_timeout)
        facts = server_facts(replicas[0].url, model.served_name)
    except BaseException:
        _end(replicas)
        node.release(parts)
        raise
    _replicas[lease_id] = replicas
    urls = tuple(f"{replica.url}/v1" for replica in replicas)
    return ServerHandle(urls, model.served_name, config.infra.engine, lease_id, None, facts)


def _launch(
    engine: Engine,
    python: Path,
    config: RunConfig,
    model: PreparedModel,
    run_dir: Path,
    lease_id: str,
    number: int,
    gpus: GpuLease | None,
) -> Replica:
    """Start replica `number` under a lease of its own, which is on disk first, and on its GPUs."""
    port = free_port()
    command = engine.command(python, config, model, port)
    variables = {**engine.variables(python, config, number), **(gpus.variables if gpus else {})}
    url, log = f"http://127.0.0.1:{port}", _log(run_dir, config.infra.engine, number)

    def launch() -> tuple[OwnedProcess, Lease]:
        logger.info("starting %s", masked(command))
        lease = take_lease(
            run_dir, model.model_id, f"{lease_id}-{number}" if number else lease_id,
            hour_price=price_an_hour(config, config.vllm.tensor_parallel_size),
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


def _log(run_dir: Path, engine: str, number: int) -> Path:
    return paths.logs_dir(run_dir) / (f"{engine}-{number}.log" if number else f"{engine}.log")


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


def _end(replicas: list[Replica]) -> None:
    with contextlib.ExitStack() as stack:  # one that cannot be ended keeps no other alive
        for replica in replicas:
            if replica.gpus:
                stack.callback(replica.gpus.release)
            stack.callback(drop_lease, replica.lease)
            stack.callback(replica.process.stop)


def stop_server(handle: ServerHandle) -> None:
    """Give the server back, from whichever process. May be called twice; an endpoint is not ours and left alone."""
    if handle.lease_id is None:
        return
    _end(_replicas.pop(handle.lease_id, []))
    for lease in family(handle.lease_id):  # on Modal, or another process started it
        if lease.kind == "modal":
            modal_servers.finish(lease)
        else:
            stop_lease(lease)


def server_exit(handle: ServerHandle) -> str | None:
    """What a dead server said last; `None` while it lives, and for an endpoint.

    A replica on a node that died is started again here; meanwhile, and when its restarts are used up, the proxy gives its
    calls to the others. Anywhere else one dead replica is a dead server.
    """
    if handle.lease_id is None:
        return None
    if replicas := _replicas.get(handle.lease_id):
        return _look_after(replicas)
    if handle.app:
        return modal_servers.exit_message(handle.lease_id)
    for number, lease in enumerate(family(handle.lease_id)):
        if not server_alive(lease):
            log = _log(Path(lease.run_dir), handle.engine, number)
            return f"the model server (pid {lease.server_pid}) is gone; the end of {log}:\n{last_lines(log)}"
    return None


def _look_after(replicas: list[Replica]) -> str | None:
    """Restart what has died and may be restarted; the words of a dead one when that leaves too few."""
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
