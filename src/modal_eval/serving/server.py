"""Start → ready → stop, the same for every kind of server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from modal_eval import paths
from modal_eval.config.models import RunConfig
from modal_eval.processes import last_lines
from modal_eval.records import Lease, PreparedModel, ServerHandle
from modal_eval.serving import keeping, modal_app, modal_servers, placing, replicas
from modal_eval.serving.cleaning import clean, stop_lease
from modal_eval.serving.endpoint import check_endpoint
from modal_eval.serving.leases import family, new_lease_id, server_alive
from modal_eval.serving.replicas import Owner, Replica

logger = logging.getLogger(__name__)

_replicas: dict[str, list[Replica]] = {}
"""By the handle's lease id: a server stops with this process, so this process has to keep it."""


def start_server(
    config: RunConfig, model: PreparedModel, run_dir: Path, *, say: Callable[[str], None] = logger.info
) -> ServerHandle:
    """Start the server that `config` asks for, or share one that was kept, and return once it answers.

    First ends what dead runs left. `auto` starts it here or on Modal, as `placing` says. Raises `ServerError` with the
    server's last words when it dies or stays silent beyond `infra.startup_timeout`; then no process and no lease is left.
    """
    return placing.start_in_turn(config, model, lambda there, loadable: _start(there, loadable, run_dir, say), say=say)


def _start(config: RunConfig, model: PreparedModel, run_dir: Path, say: Callable[[str], None]) -> ServerHandle:
    wanted = modal_app.plan(config, model) if config.infra.target == "modal" else None
    for deed in clean(spare=wanted.name if wanted else "", modal=wanted is not None).deeds:
        say(str(deed))
    if wanted:
        return modal_servers.start(config, model, wanted, run_dir, say=say)
    if config.infra.target == "endpoint":
        return check_endpoint(config, model, say=say)
    name = keeping.name_of(config, model, say=say)
    if handle := keeping.start(config, model, name, run_dir, say=say):
        return handle
    owner = Owner(new_lease_id(), str(run_dir), paths.logs_dir(run_dir), run_dir)
    running, facts = replicas.start(config, model, owner, say=say)
    _replicas[owner.lease_id] = running
    urls = tuple(f"{replica.url}/v1" for replica in running)
    return ServerHandle(urls, model.served_name, config.infra.engine, owner.lease_id, None, facts)


def deploy(config: RunConfig, model: PreparedModel, *, say: Callable[[str], None]) -> Lease:
    """Start a server without a run: it stays until it is stopped, or `infra.lifetime` is over.

    Returns once Modal names its URL, without waking a GPU, or once it answers here. Raises as `start_server` does.
    """
    start = modal_servers.deploy if config.infra.target == "modal" else keeping.deploy
    return start(config, model, say=say)


def stop_server(handle: ServerHandle) -> None:
    """Give the server back, from whichever process. May be called twice; an endpoint is not ours and left alone."""
    if handle.lease_id is None:
        return
    replicas.end(_replicas.pop(handle.lease_id, []))
    for lease in family(handle.lease_id):  # it is shared, or another process started it
        if lease.kind == "modal":
            modal_servers.finish(lease)
        elif lease.kind == "keeper":
            keeping.finish(lease)
        else:
            stop_lease(lease)


def server_exit(handle: ServerHandle) -> str | None:
    """What a dead server said last; `None` while it lives, and for an endpoint.

    A replica on a node that died is started again by whoever has it, which is done here if that is this process;
    meanwhile, and when its restarts are used up, the proxy gives its calls to the others. Anywhere else one dead replica is
    a dead server.
    """
    if handle.lease_id is None:
        return None
    if running := _replicas.get(handle.lease_id):
        return replicas.look_after(running)
    if handle.app:
        return modal_servers.exit_message(handle.lease_id)
    if handle.kept:
        return keeping.exit_message(handle.lease_id)
    for number, lease in enumerate(family(handle.lease_id)):
        if not server_alive(lease):
            log = replicas.log_path(paths.logs_dir(Path(lease.run_dir)), handle.engine, number)
            return f"the model server (pid {lease.server_pid}) is gone; the end of {log}:\n{last_lines(log)}"
    return None
