"""Servers of this machine that outlive their run: started under a keeper, found by name, shared, given back.

The same as on Modal: the name is the configuration, each run has a lease of its own, and the server ends with the last of
them. What Modal is there, a process of ours is here: the keeper.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from modal_eval import environments, errors, paths
from modal_eval.config.models import RunConfig
from modal_eval.errors import ModalEvalError, ServerError
from modal_eval.processes import boot_id, is_alive, kill_group, last_lines, start_ticks
from modal_eval.records import Lease, PreparedModel, ServerHandle
from modal_eval.serving import sharing
from modal_eval.serving.keeper_state import ASKED, STATE, State, read_state
from modal_eval.serving.leases import (
    drop_lease,
    end_processes,
    is_live,
    lease_of,
    leases,
    new_lease_id,
    note_server,
    now,
    take_lease,
    write_lease,
    write_whole,
)
from modal_eval.serving.replicas import STOP_GRACE_S, engine_of

VERSION = 1
"""Of what a name stands for. A change of how servers are started raises it: old ones are then not shared."""
POLL_S = 0.1
END_S = 3 * STOP_GRACE_S
"""A keeper ends its replicas in this time; one that does not is killed, and they with it."""
LOG_LINES = 400
LOGS_S = 7 * 86400.0
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


def folder_of(name: str) -> Path:
    return paths.state_dir() / "servers" / name


def name_of(config: RunConfig, model: PreparedModel, *, say: Callable[[str], None]) -> str:
    """`ENGINE-MODEL-HASH`: equal for equal servers of equal weights on one host, and for no others."""
    engine = engine_of(config)
    python = engine.environment(config, say=say)
    stamp = python.parent.parent / environments.STAMP
    seen = engine.variables(python, config, 0)
    content = {
        "version": VERSION,
        "host": socket.gethostname(),  # nodes with one home folder see each other's state and leases
        "command": engine.command(python, config, model, 0),
        "environment": stamp.read_text() if stamp.is_file() else None,
        "weights": [model.revision, model.digest],
        "template": model.chat_template_sha256,
        "target": config.infra.target,
        "replicas": [config.vllm.data_parallel_size, config.vllm.tensor_parallel_size],
        "variables": {name: seen.get(name) for name in VARIABLES},
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", model.served_name)[:40].strip("-.")
    return f"{config.infra.engine}-{slug}-{digest}"


def running(name: str) -> State | None:
    """The keeper of the server `name`, if it lives and its server does."""
    state = read_state(folder_of(name))
    return state if state and state.alive and not state.fault else None


def start(
    config: RunConfig, model: PreparedModel, name: str, run_dir: Path | None, *, say: Callable[[str], None]
) -> ServerHandle | None:
    """Share the server `name`, or start it if `infra.keep` asks to keep it; returns once it answers.

    `None` when there is none to share and none is to be kept. Raises what starting a server raises; then the lease is
    gone, and the server, too, unless somebody else holds it.
    """
    lease = acquire(config, model, name, run_dir, config.infra.keep, say=say)
    if lease is None:
        return None
    try:
        state = wait_ready(lease, say)
        write_lease(replace(lease, url=state.urls[0].removesuffix("/v1")))
    except BaseException:
        save_logs(lease)
        release(lease)
        raise
    return ServerHandle(
        tuple(state.urls), model.served_name, config.infra.engine, lease.lease_id, None, state.facts, kept=name
    )


def acquire(
    config: RunConfig,
    model: PreparedModel,
    name: str,
    run_dir: Path | None,
    keep_s: float,
    *,
    deadline: float | None = None,
    say: Callable[[str], None],
) -> Lease | None:
    """A lease of the server `name`, whose keeper runs when this returns; `None` as for `start`."""
    with sharing.lock(name):
        state = running(name)
        if state is None and not keep_s:
            return None
        lease = take_lease(
            run_dir, model.model_id, new_lease_id(), kind="keeper", app=name, since=state.since if state else "",
            keep_s=keep_s, deadline=deadline,
        )  # fmt: skip
        try:
            if state:
                say(f"{name} is running already and is shared")
                pid, started = state.pid, state.started
            else:
                say(f"starting {name} under a keeper of its own")
                pid = _start_keeper(config, model, name)
                started = start_ticks(pid)
        except BaseException:
            drop_lease(lease)
            raise
        return note_server(lease, pid, started, "")


def _start_keeper(config: RunConfig, model: PreparedModel, name: str) -> int:
    """In a session of its own and under no guardian of ours: it is to outlive us."""
    folder = folder_of(name)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True, mode=0o700)
    asked = {"config": config.model_dump(mode="json"), "model": model.to_json()}
    write_whole(folder / ASKED, asked)
    with (folder / "logs" / "keeper.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "modal_eval.serving.keeper", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    _children.append(process)
    _announce(folder, process.pid)
    return process.pid


def _announce(folder: Path, pid: int) -> None:
    """Write the keeper's first state for it, unless it has: who comes before it can would start another one."""
    first = folder / f"{STATE}.{pid}"
    write_whole(first, vars(State(pid, start_ticks(pid), boot_id(), now())))
    with contextlib.suppress(FileExistsError):
        os.link(first, folder / STATE)
    first.unlink()


_children: list[subprocess.Popen[bytes]] = []
"""Keepers that this process started: it has to bury those that end before it does."""


def wait_ready(lease: Lease, say: Callable[[str], None]) -> State:
    """Pass on what the keeper says until its server answers. Raises its fault, under the same class, when it fails."""
    heard = 0
    while True:
        alive = _alive(lease)  # asked first: what it said with its last breath is read below
        state = read_state(folder_of(lease.app))
        if state and (state.pid, state.started) == (lease.server_pid, lease.server_started):
            new = min(state.said_count - heard, len(state.said))
            for text in state.said[len(state.said) - new :]:
                say(text)
            heard = state.said_count
            if state.fault:
                kind = getattr(errors, state.fault_kind, ServerError)
                raise kind(state.fault)
            if state.urls:
                return state
        if lease_of(lease.lease_id) is None:
            raise ServerError(f"the server {lease.app} was stopped by somebody else while it started")
        if not alive:
            raise ServerError(gone(lease))
        time.sleep(POLL_S)


def _alive(lease: Lease) -> bool:
    return lease.boot_id == boot_id() and _is_running(lease.server_pid, lease.server_started)


def _is_running(pid: int, started: float) -> bool:
    for child in _children:
        child.poll()
    return is_alive(pid, started)


def gone(lease: Lease) -> str:
    """Why there is no server `lease.app` any more."""
    state = read_state(folder_of(lease.app))
    if state and state.fault and state.pid == lease.server_pid:
        return state.fault
    log = folder_of(lease.app) / "logs" / "keeper.log"
    return f"the keeper of {lease.app} (pid {lease.server_pid}) has ended; the end of {log}:\n{last_lines(log)}"


def exit_message(lease_id: str) -> str | None:
    """Why the server is not ours any more; `None` while it and the lease stand."""
    lease = lease_of(lease_id)
    if lease is None:
        return f"the server was stopped by somebody else (its lease {lease_id} is gone)"
    state = read_state(folder_of(lease.app))
    failed = state is not None and state.fault != "" and state.pid == lease.server_pid
    return gone(lease) if failed or not _alive(lease) else None


def finish(lease: Lease) -> None:
    """Give the server back as the run asked for: kept for the next one, or as `release` does."""
    save_logs(lease)
    if not lease.keep_s or not is_live(lease):
        release(lease)
        return
    with sharing.lock(lease.app):
        sharing.keep(lease)


def release(lease: Lease) -> None:
    """Give back one lease; with the last one the server ends, and every process of it has ended when this returns."""
    with sharing.lock(lease.app):
        last = sharing.give_back(lease, lambda _: None)  # without a lease the keeper ends by itself
    if last:
        end(lease.app, (lease.server_pid, lease.server_started) if lease.boot_id == boot_id() else (0, 0.0))


def end(name: str, keeper_process: tuple[int, float]) -> None:
    """Wait until the keeper (pid and start) of an unwanted server has ended it, help where that takes too long, and bury
    the rest.

    A server that somebody has come to share meanwhile stays.
    """
    deadline = time.monotonic() + END_S
    while _is_running(*keeper_process) and time.monotonic() < deadline:
        if sharing.wanted(name):
            return
        time.sleep(POLL_S)
    with sharing.lock(name):
        if sharing.wanted(name):
            return
        kill_group(*keeper_process)
        left = [one for one in leases() if one.app == name and one.kind == "process"]
        end_processes(left)
        for lease in left:
            drop_lease(lease)
        (folder_of(name) / STATE).unlink(missing_ok=True)


def save_logs(lease: Lease) -> None:
    """Copy the end of each of the server's logs into the run's folder."""
    if not lease.run_dir:
        return
    place = paths.logs_dir(Path(lease.run_dir))
    place.mkdir(parents=True, exist_ok=True)
    for log in sorted((folder_of(lease.app) / "logs").glob("*.log")):
        if log.stem != "keeper":
            with contextlib.suppress(OSError):  # it is worth a line, not the run
                (place / log.name).write_text(last_lines(log, LOG_LINES) + "\n", encoding="utf-8")


def forget_old() -> None:
    """Remove the folders of servers that ended `LOGS_S` seconds ago; until then somebody may want to read their logs."""
    for log in (paths.state_dir() / "servers").glob("*/logs/keeper.log"):
        name = log.parent.parent.name
        with contextlib.suppress(FileNotFoundError):  # somebody was faster
            if time.time() - log.stat().st_mtime > LOGS_S and not any(one.app == name for one in leases()):
                with sharing.lock(name):
                    if not (running(name) or sharing.shares(name)):
                        shutil.rmtree(folder_of(name), ignore_errors=True)


def deploy(config: RunConfig, model: PreparedModel, *, say: Callable[[str], None]) -> Lease:
    """Start a server that outlives this process: until it is stopped, or `infra.lifetime` is over.

    Returns once it answers. Raises what starting a server raises.
    """
    name = name_of(config, model, say=say)
    lease = acquire(
        config, model, name, None, config.infra.lifetime, deadline=time.time() + config.infra.lifetime, say=say
    )
    assert lease is not None
    try:
        state = wait_ready(lease, say)
    except BaseException as error:
        release(lease)
        if isinstance(error, ModalEvalError) or not isinstance(error, Exception):
            raise
        raise ServerError(f"{name} did not start: {error}") from error
    lease = replace(lease, url=state.urls[0].removesuffix("/v1"), benchmark=config.name)
    with sharing.lock(name):
        return sharing.keep(lease)
