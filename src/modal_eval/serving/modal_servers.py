"""A server on Modal: shared by runs that ask for the same one, stopped with the last of them.

start → ready → (use) → release, and at each step the lease on disk comes first. What stops a server that all of us have
forgotten is Modal: its GPU goes back after `infra.scaledown_window` without a call, whatever becomes of us.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import httpx

from modal_eval import paths
from modal_eval.checkpoints.resolve import loadable_files
from modal_eval.config.models import RunConfig
from modal_eval.errors import ModalEvalError, ServerError
from modal_eval.records import Lease, PreparedModel, ServerHandle
from modal_eval.serving import modal_app, modal_calls, modal_keys, sharing
from modal_eval.serving.endpoint import server_facts
from modal_eval.serving.leases import (
    drop_lease,
    is_live,
    lease_of,
    leases,
    new_lease_id,
    take_lease,
    write_lease,
)
from modal_eval.serving.modal_app import Plan
from modal_eval.serving.prices import UNKNOWN, Price, price_of
from modal_eval.serving.sharing import others_of

logger = logging.getLogger(__name__)

LOG = "modal_vllm.log"
LOG_LINES = 400
SHOWN_LINES = 20
POLL_S = 1.0
ONE_REQUEST_S = 170.0
"""Modal lets a request wait for 150 s before it answers with a 303."""
FAILURES = 3
"""So many answers of 500 in a row while it starts: its container fails."""
DEPLOYED = "deployed"
"""Holder of an app that `modal deploy` made: it has no lease here, and outlives every run until its deadline."""
IDLE_S = 86400.0
"""So long after its deadline no app has a GPU any more: nobody has called it for longer than any `infra.scaledown_window`."""


class OtherAccountError(ServerError):
    """A server that another account than ours has on Modal: only that one can say whether it is there."""


def start(
    config: RunConfig, model: PreparedModel, wanted: Plan, run_dir: Path, *, say: Callable[[str], None]
) -> ServerHandle:
    """Deploy the server that is `wanted`, or share one that is there, and return once it answers.

    Raises `ServerError`; then the lease is gone, and the server, too, unless somebody else holds it.
    """
    lease = acquire(wanted, model.model_id, run_dir, config.infra.keep, price_on_modal(config), say=say)
    try:
        key_name = modal_keys.key_variable(lease.app)
        say(f"{lease.app} is at {lease.url}; its first answer takes minutes when its GPU is cold")
        wait_ready(lease, modal_keys.key(lease.app), config.infra.startup_timeout, say)
        facts = server_facts(lease.url, model.served_name, modal_keys.key(lease.app))
    except BaseException:
        _undo(lease)
        raise
    return ServerHandle((f"{lease.url}/v1",), model.served_name, "vllm", lease.lease_id, key_name, facts, lease.app)


def price_on_modal(config: RunConfig) -> Price:
    return price_of(config, config.vllm.replicas * config.vllm.tensor_parallel_size)


def acquire(
    wanted: Plan,
    model_id: str,
    run_dir: Path | None,
    keep_s: float = 0,
    price: Price = UNKNOWN,
    *,
    say: Callable[[str], None],
) -> Lease:
    """A lease of the app of `wanted`, which is deployed when this returns."""
    name, deadline = wanted.name, time.time() + wanted.lifetime_s
    with sharing.lock(name):
        lease = take_lease(
            run_dir, model_id, new_lease_id(), kind="modal", app=name, since=sharing.beginning(name), deadline=deadline,
            keep_s=keep_s, price=price, account=modal_calls.account(),
        )  # fmt: skip
        try:
            url = modal_calls.web_url(name, modal_app.FUNCTION)
        except BaseException:
            drop_lease(lease)
            raise
        try:
            if url and modal_keys.has_key(name):
                say(f"{name} is deployed already and is shared")
                _adopt(lease)
                modal_calls.set_tags(name, tags_of(lease, price))
            else:
                _upload(wanted, say)
                say(
                    f"deploying {name} on Modal ({wanted.gpu}); the first time Modal makes its image, which takes minutes"
                )
                modal_calls.deploy(modal_app.load_app(wanted, tags_of(lease, price)), name, wanted.startup_timeout_s)
                url = _url_of(name)
        except BaseException:
            _undo(lease, locked=True)
            raise
        lease = replace(lease, url=url.rstrip("/"))
        write_lease(lease)
    return lease


def _upload(wanted: Plan, say: Callable[[str], None]) -> None:
    """Bring a checkpoint of this machine to where the server will look for it."""
    if (folder := wanted.checkpoint) is None:
        return
    files = {file.relative_to(folder).as_posix(): file for file in loadable_files(folder)}
    size = sum(file.stat().st_size for file in files.values())
    place = wanted.command[2].rpartition("/")[2]
    say(f"uploading {wanted.model} to Modal, once ({size / 1e9:.1f} GB)")
    if not modal_calls.upload(modal_app.CHECKPOINT_VOLUME, place, files):
        say(f"{wanted.model} is on Modal already")


def _url_of(app: str) -> str:
    if url := modal_calls.web_url(app, modal_app.FUNCTION):
        return url
    raise ServerError(f"{app} is deployed, but Modal names no URL of it; see it in Modal's dashboard")


def _adopt(lease: Lease) -> None:
    """Give an app that somebody deployed by hand a lease of its own, so that no run stops it before its deadline."""
    others = others_of(lease)
    for one in others:
        if not is_live(one) and not _is_foreign(one):
            drop_lease(one)
    for app in [] if others else modal_calls.live_apps(lease.app):
        if app.tags.get("holder") == DEPLOYED and app.deadline:
            write_lease(
                replace(
                    lease,
                    lease_id=new_lease_id(),
                    kept=True,
                    deadline=app.deadline,
                    run_dir="",
                    benchmark=app.tags.get("benchmark", ""),
                )
            )


def wait_ready(lease: Lease, key: str, limit_s: float, say: Callable[[str], None]) -> None:
    """Ask for the models until they come, through as many 303s as it takes.

    Raises `ServerError` with the end of the server's log when it fails or stays silent.
    """
    deadline, failures, told = time.monotonic() + limit_s, 0, False
    first = url = f"{lease.url}/v1/models"
    with httpx.Client() as client:
        while (left := deadline - time.monotonic()) > 0:
            began = time.monotonic()
            if reason := exit_message(lease.lease_id):
                raise ServerError(reason)
            try:
                answer = client.get(url, timeout=min(ONE_REQUEST_S, left), headers=_headers(url, lease, key))
            except httpx.TransportError:
                answer = httpx.Response(httpx.codes.BAD_GATEWAY)
            if answer.status_code == httpx.codes.OK:
                return
            if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                raise ServerError(
                    f"{lease.app} refuses our key ({answer.status_code}); `modal-eval stop --all` ends it, and the next run "
                    "deploys it anew"
                )
            # a container that fails is started again a few times, and Modal says 500 meanwhile
            failures = failures + 1 if answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR else 0
            if failures >= FAILURES:
                raise ServerError(f"{lease.app} does not start (HTTP 500); {log_end(lease)}")
            location = answer.headers.get("Location") if answer.status_code == httpx.codes.SEE_OTHER else None
            url = str(answer.url.join(location)) if location else first
            if not told and time.monotonic() - began > 1:
                say(f"waiting for {lease.app}: a cold GPU loads the model now")
                told = True
            time.sleep(max(0.0, POLL_S - (time.monotonic() - began)))
    raise ServerError(
        f"{lease.app} did not answer within infra.startup_timeout={limit_s:g} s and was given back; raise the limit, or see "
        f"its log; {log_end(lease)}"
    )


def _headers(url: str, lease: Lease, key: str) -> dict[str, str]:
    """The key goes to the server's own host and to no other, wherever a redirect points."""
    return {"Authorization": f"Bearer {key}"} if httpx.URL(url).host == httpx.URL(lease.url).host else {}


def finish(lease: Lease) -> None:
    """Give the server back as the run asked for: kept for the next one, or as `release` does.

    A Modal that cannot be asked just then fails no run that is done: the lease stays, and anybody may stop the server.
    """
    save_log(lease)
    try:
        if not lease.keep_s:
            release(lease)
            return
        with sharing.lock(lease.app):
            sharing.keep(lease)
            modal_calls.set_tags(lease.app, tags_of(lease, Price(lease.gpus, lease.gpu)))
    except ServerError as error:
        logger.warning("%s stays for now: %s", lease.app, error)
        if not lease.keep_s:
            write_lease(replace(lease, deadline=time.time()))


def tags_of(lease: Lease, price: Price) -> dict[str, str]:
    """What the lease's app says while anybody here has a right to it: other machines see no lease, and go by its tags."""
    live = [one for one in sharing.shares(lease.app) if is_live(one)]
    users = [f"{one.host}-{one.holder_pid}-{one.lease_id}" for one in live if not one.kept]
    deadline = max((one.deadline or 0 for one in live), default=0)
    return modal_app.app_tags(lease.model, users[-1] if users else "kept", deadline, price)


def release(lease: Lease) -> None:
    """Give back one lease; the last one stops the app.

    Raises `ServerError` when Modal cannot be asked, and `OtherAccountError` when the app was deployed under another login
    and ours does not find it; the lease stays then, for the next run or `modal-eval stop`.
    """
    with sharing.lock(lease.app):
        sharing.give_back(lease, lambda _: _stop_of(lease))


def _stop_of(lease: Lease) -> None:
    """Stop the lease's app, by whichever login finds it: an account may have several."""
    found = modal_calls.stop(lease.app)
    over = lease.deadline is not None and lease.deadline + IDLE_S < time.time()
    if not found and _is_foreign(lease) and not over:
        raise OtherAccountError(
            f"it was deployed under another login or environment of Modal ({lease.account}) than this one "
            f"({modal_calls.account()}), where there is no such app; `modal-eval stop` there ends it, and without a call "
            "Modal takes its GPU back after infra.scaledown_window"
        )
    modal_keys.forget(lease.app)


def _is_foreign(lease: Lease) -> bool:
    return lease.account not in ("", modal_calls.account())


def _stop(app: str) -> None:
    modal_calls.stop(app)
    modal_keys.forget(app)


def _undo(lease: Lease, *, locked: bool = False) -> None:
    """Give back what did not come up; a Modal that cannot be asked any more hides no earlier fault."""
    try:
        if locked:
            sharing.give_back(lease, lambda _: _stop_of(lease))
        else:
            release(lease)
    except ServerError as error:
        logger.warning("%s stays for now: %s", lease.app, error)


def save_log(lease: Lease) -> None:
    """Copy the end of the server's log into the run's folder, as far as Modal gives it."""
    if not lease.run_dir:
        return
    path = paths.logs_dir(Path(lease.run_dir)) / LOG
    try:
        text = modal_calls.last_log_lines(lease.app, LOG_LINES)
    except ModalEvalError as error:  # it is worth a line, not the run
        text = f"{error}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # a full disk keeps no GPU
        logger.warning("the log of %s is not kept: %s", lease.app, error)


def log_end(lease: Lease) -> str:
    save_log(lease)
    path = paths.logs_dir(Path(lease.run_dir)) / LOG
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return f"the end of {path}:\n" + "\n".join(lines[-SHOWN_LINES:])


def exit_message(lease_id: str) -> str | None:
    """Why the server is not ours any more; `None` while the lease stands."""
    if lease_of(lease_id) is None:
        return f"the server on Modal was stopped by somebody else (its lease {lease_id} is gone)"
    return None


def deploy(config: RunConfig, model: PreparedModel, *, say: Callable[[str], None]) -> Lease:
    """Deploy a server that outlives this process: until it is stopped, or `infra.lifetime` is over.

    Returns once Modal names its URL, without waking a GPU. Raises `ServerError`.
    """
    wanted = modal_app.plan(config, model)
    lease = acquire(wanted, model.model_id, None, 0, price_on_modal(config), say=say)
    lease = replace(lease, kept=True, benchmark=config.name)
    write_lease(lease)
    for other in others_of(lease):  # it is renewed, not doubled
        if other.kept and other.account == lease.account:
            drop_lease(other)
    return lease


@dataclass(frozen=True, slots=True)
class Orphan:
    """An app of ours on Modal that has no lease here."""

    app: str
    model: str
    """As a tag spells it: `tag`."""
    created_at: str
    deadline: float | None
    holder: str
    ours: bool
    """Made by this user's state; another one's is only shown until its deadline has passed."""
    price: Price = UNKNOWN
    benchmark: str = ""
    """Whose settings it was deployed with, as a tag spells it."""

    def serves(self, model: str) -> bool:
        return self.model == modal_app.tag(model)

    @property
    def may_stop(self) -> bool:
        """Whether nobody has a right to it any more."""
        expired = self.deadline is not None and self.deadline < time.time()
        return expired or (self.ours and self.holder not in (DEPLOYED, "kept"))


def orphans() -> list[Orphan]:
    """The apps on Modal that modal-eval deployed and that no lease here speaks of. Raises `ServerError`."""
    found = [app for app in modal_calls.live_apps(modal_app.PREFIX) if app.tags.get("tool") == "modal-eval"]
    known = {lease.app for lease in leases()}  # looked at afterwards: an app is deployed after its lease is written
    return [
        Orphan(
            app.name,
            app.tags.get("model", ""),
            app.created_at.isoformat(timespec="seconds") if app.created_at else "",
            app.deadline,
            app.tags.get("holder", "nobody"),
            app.tags.get("owner") == modal_keys.owner(),
            modal_app.tagged_price(app.tags.get("gpus", "")),
            app.tags.get("benchmark", ""),
        )
        for app in found
        if app.name not in known
    ]


def stop_orphan(orphan: Orphan) -> bool:
    """Stop an app that has no lease; `False` when it has one by now. Raises `ServerError` when Modal cannot be asked."""
    with sharing.lock(orphan.app):
        if sharing.shares(orphan.app):
            return False
        _stop(orphan.app)
        return True
