"""Ending what nobody has a right to any more, whichever kind it is: what the janitor, `modal-eval stop` and each run do.

What is ended was looked at twice: a run may have been given a server between the look and the stop.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from modal_eval import gpus
from modal_eval.errors import ModalEvalError, ServerError
from modal_eval.records import Lease
from modal_eval.serving import keeping, modal_calls, modal_servers, sharing
from modal_eval.serving.leases import drop_lease, end_processes, holder_alive, is_live, lease_of
from modal_eval.serving.servers import Server, here, servers

logger = logging.getLogger(__name__)

Outcome = Literal["stopped", "not stopped", "would be stopped", "left alone"]


@dataclass(frozen=True, slots=True)
class Deed:
    """One server, or one leftover on a GPU, and what became of it."""

    server: str
    where: str
    """A host, or Modal."""
    model: str
    reason: str
    """Why it is not to be there any more."""
    outcome: Outcome
    fault: str = ""
    """Why it could not be stopped."""

    def __str__(self) -> str:
        what = f"{self.server} ({self.model})" if self.model else self.server
        line = f"{self.outcome}: {what} on {self.where}; {self.reason}"
        return f"{line}; {self.fault}" if self.fault else line


@dataclass(frozen=True, slots=True)
class Cleaned:
    """All that one look brought."""

    deeds: list[Deed] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    """What could not be looked at, and why; the rest was."""

    @property
    def faults(self) -> list[str]:
        """All that went wrong; what could be done was done all the same."""
        stay = [f"{one.server} on {one.where} stays for now: {one.fault}" for one in self.deeds if one.fault]
        return [*self.unseen, *stay]

    def rows(self) -> list[dict[str, Any]]:
        """A table of it."""
        return [asdict(deed) for deed in self.deeds]


def clean(*, spare: str = "", modal: bool = True, dry: bool = False) -> Cleaned:
    """End every server whose holder is dead or whose deadline has passed, and our leftovers on GPUs.

    Looks at the leases on disk, with `modal` at the tags of the apps of Modal, if an account is configured, and at the
    processes of this machine. `spare` names an app that is about to be shared; with `dry` nothing is ended. Processes of
    other hosts are theirs to end. A fault at one keeps it from no other and raises nothing: what could not be stopped stays
    for the next look, and Modal takes an idle GPU back by itself.
    """
    done = Cleaned()
    orphans: list[modal_servers.Orphan] = []
    if modal and modal_calls.configured():
        with_faults(done, "Modal was not looked at", lambda: orphans.extend(modal_servers.orphans()))
    for server in servers(orphans):
        if server.app == spare != "" or not (server.on_modal or server.here):
            continue
        if server.live:
            forget_dead(server, dry=dry)
        elif dry:
            done.deeds.append(deed_of(server, "would be stopped"))
        else:
            done.deeds.extend(stop_dead(server))
    if not dry:
        with_faults(done, "leftovers on GPUs were not looked at", lambda: done.deeds.extend(leftovers()))
        with_faults(done, "old logs were not removed", keeping.forget_old)
    return done


def with_faults(done: Cleaned, what: str, work: Callable[[], None]) -> None:
    try:
        work()
    except ModalEvalError as error:
        done.unseen.append(f"{what}: {error}")
    except OSError as error:
        done.unseen.append(f"{what}: {type(error).__name__}: {error}")


def deed_of(server: Server, outcome: Outcome, fault: str = "") -> Deed:
    return Deed(server.name, server.where, server.model, server.why_not_live, outcome, fault)


def stop_dead(server: Server) -> Iterator[Deed]:
    """Stop what `server` is, if a second look finds nobody who has a right to it either."""
    try:
        if server.orphan is not None:
            gone = modal_servers.stop_orphan(server.orphan)
        else:
            ended = [stop_if_dead(lease) for lease in server.leases or server.processes]
            gone = all(ended)
    except modal_servers.OtherAccountError as error:  # as of another host: theirs to end
        yield replace(deed_of(server, "left alone"), reason=f"{server.why_not_live}, and {error}")
        return
    except (ModalEvalError, OSError) as error:
        logger.warning("%s stays for now: %s", server.name, error)
        yield deed_of(server, "not stopped", str(error))
        return
    if gone:
        yield deed_of(server, "stopped")


def forget_dead(server: Server, *, dry: bool) -> None:
    """Drop the leases of dead runs on a server that others use, under the same account if it is on Modal."""
    used = {one.account for one in server.leases if is_live(one)}
    for lease in server.leases:
        if server.app and not dry and not is_live(lease) and lease.account in used:
            with contextlib.suppress(ModalEvalError, OSError):
                stop_if_dead(lease)


def stop_if_dead(lease: Lease) -> bool:
    current = lease_of(lease.lease_id)
    if current is None:  # the last one that was stopped took it along
        return True
    if is_live(current):
        return False
    stop_lease(current)
    return True


def leftovers() -> Iterator[Deed]:
    """End this user's processes on GPUs whose lease has lost its holder."""
    for pid in gpus.end_leftovers():
        yield Deed(f"pid {pid}", socket.gethostname(), "", "the holder of its GPU is dead", "stopped")


def stop_lease(lease: Lease) -> None:
    """End the lease's server with what is left of its session, and drop the lease.

    A shared server that another run still holds stays for that run. Raises `ServerError` for a process of another host,
    which cannot be reached from here, and when Modal cannot be asked.
    """
    if lease.kind == "modal":
        modal_servers.release(lease)
        return
    if not here(lease):
        raise ServerError(f"the server of lease {lease.lease_id} runs on {lease.host}; run `modal-eval stop` there")
    if lease.kind == "keeper":
        keeping.release(lease)
        return
    if lease.app and holder_alive(lease):
        keeping.end(lease.app, (lease.holder_pid, lease.holder_started))  # its keeper would only start it again
        return
    end_processes([lease])
    drop_lease(lease)


def stop_all(found: Iterable[Server]) -> Cleaned:
    """Stop `found` whether or not somebody holds them.

    A server that leases beyond those of `found` still hold stays, and its leases that were named are dropped.
    """
    done = Cleaned()
    for server in found:
        deed = Deed(server.name, server.where, server.model, "it was asked for", "stopped")
        try:
            if server.orphan is not None:
                modal_servers.stop_orphan(server.orphan)
            for lease in (*server.leases, *server.processes):
                if (current := lease_of(lease.lease_id)) is not None:
                    stop_lease(current)
        except (ModalEvalError, OSError) as error:  # the others are to be stopped all the same
            done.deeds.append(replace(deed, outcome="not stopped", fault=str(error)))
            continue
        if not (server.app and sharing.wanted(server.app)):
            done.deeds.append(deed)
    return done
