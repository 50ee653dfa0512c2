"""Ending a server by its lease, whichever kind it is, from any process."""

from __future__ import annotations

import logging
import socket

from modal_eval.errors import ServerError
from modal_eval.processes import boot_id, kill_group
from modal_eval.records import Lease
from modal_eval.serving import modal_servers
from modal_eval.serving.leases import drop_lease, is_live, leases

logger = logging.getLogger(__name__)


def stop_lease(lease: Lease) -> None:
    """End the lease's server with what is left of its session, and drop the lease.

    A server on Modal that another run still holds stays for that run. Raises `ServerError` for a process of another host,
    which cannot be reached from here, and when Modal cannot be asked.
    """
    if lease.kind == "modal":
        modal_servers.release(lease)
        return
    if lease.host != socket.gethostname():
        raise ServerError(f"the server of lease {lease.lease_id} runs on {lease.host}; run `modal-eval stop` there")
    if lease.boot_id == boot_id():
        kill_group(lease.server_pid, lease.server_started)
    drop_lease(lease)


def sweep_dead(spare: str = "") -> list[Lease]:
    """End every server whose holder is dead or whose deadline has passed, but the app `spare`; returns their leases.

    Processes of other hosts are theirs to end. A Modal that cannot be asked keeps nobody from starting here: its leases
    stay for the next sweep, and Modal takes an idle GPU back by itself.
    """
    here = [one for one in leases() if one.kind == "modal" or one.host == socket.gethostname()]
    dead = [one for one in here if not is_live(one) and (not one.app or one.app != spare)]
    ended = []
    for lease in dead:
        try:
            stop_lease(lease)
        except ServerError as error:
            logger.warning("the server of lease %s stays for now: %s", lease.lease_id, error)
            continue
        ended.append(lease)
    return ended
