"""Processes that keep a GPU and that nobody waits for any more: how they are known, and how they end.

Ours carry the mark of their lease in their environment. When the process that held the lease is gone, nobody can read
what they compute: they are ended on sight. Those of other programs are only guessed at, so only on request, only this
user's, and only when both signs are there: they were adopted (see `adopted`), and their GPU was idle for `IDLE_S`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from modal_eval.gpus.folder import Folder
from modal_eval.gpus.inventory import inventory
from modal_eval.gpus.lease import MARK_VARIABLE
from modal_eval.gpus.records import Gpu
from modal_eval.processes import is_alive, start_ticks

IDLE_S = 10.0
"""A server that somebody uses runs a kernel in this time; between two batches of a training it is a second at most."""
SAMPLE_S = 0.5
GRACE_S = 10.0
"""A guardian of ours that is ending its server gets the time to do it in order."""
POLL_S = 0.05


def end_ours(folder: Folder | None = None) -> list[int]:
    """End this user's processes whose lease has lost its holder; returns their pids."""
    left = ours_left(folder or Folder())
    end_processes(left)
    return sorted(left)


def ours_left(folder: Folder) -> dict[int, float]:
    """This user's processes with the mark of a lease of this folder whose holder is gone: starts by pid."""
    marked = list(marked_processes(folder))
    if not marked:
        return {}
    current = {holder.lease_id for holder in folder.holders() if holder.alive}
    return {
        pid: started
        for pid, started, lease_id, owner in marked
        if lease_id not in current and not is_alive(*owner) and pid != os.getpid()
    }


def marked_processes(folder: Folder) -> Iterator[tuple[int, float, str, tuple[int, float]]]:
    """This user's processes with a mark of this folder: pid, start, lease id, and who took the lease."""
    sign = f"{MARK_VARIABLE}={folder.path}:".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # ended while we looked
            continue
        found = next((word for word in environment if word.startswith(sign)), None)
        if found and (started := start_ticks(pid)):
            lease_id, owner, owner_started = found[len(sign) :].decode().split(":")
            yield pid, started, lease_id, (int(owner), float(owner_started))


def orphans(gpus: Sequence[Gpu], idle_s: float = IDLE_S) -> dict[int, float]:
    """This user's processes on `gpus` that were adopted and leave their GPUs idle: starts by pid.

    The driver is asked again and again for `idle_s` seconds, if there is anybody to be watched.
    """
    users = {one.pid for gpu in gpus for one in gpu.processes}
    watched = {pid: started for pid in users if (started := start_ticks(pid)) and is_ours_to_end(pid) and adopted(pid)}
    deadline = time.monotonic() + idle_s
    while watched:
        for gpu in inventory():
            if gpu.utilization != 0:  # also where the driver does not tell
                for one in gpu.processes:
                    watched.pop(one.pid, None)
        if time.monotonic() >= deadline:
            break
        time.sleep(SAMPLE_S)
    return {pid: started for pid, started in watched.items() if is_alive(pid, started)}


def is_ours_to_end(pid: int) -> bool:
    """Whether the process belongs to this very user; root, too, ends only what root has started."""
    try:
        return pid != os.getpid() and Path(f"/proc/{pid}").stat().st_uid == os.getuid()
    except OSError:
        return False


def adopted(pid: int) -> bool:
    """Whether the program that `pid` was a part of has ended: it, or the eldest process above it, was adopted.

    A process is born into the session of its parent. One that lives in another session than its parent either began it,
    as a daemon does, or has lost its real parent and was given to init. In the latter case the leader of the session has
    to have ended as well, or a terminal or a shell still knows of the process.
    """
    while pid > 1:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            parent, session = int(fields[1]), int(fields[3])
            parents_session = os.getsid(parent) if parent else 0
        except (OSError, IndexError):
            return False
        if parents_session != session:
            return start_ticks(session) == 0
        pid = parent
    return False


def end_processes(processes: Mapping[int, float], grace_s: float = GRACE_S) -> None:
    """End processes, known by pid and start: TERM, then KILL to those that are left after `grace_s` seconds."""
    deadline = time.monotonic() + grace_s
    _send(processes, signal.SIGTERM)
    while any(is_alive(*one) for one in processes.items()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    _send(processes, signal.SIGKILL)
    while any(is_alive(*one) for one in processes.items()) and time.monotonic() < deadline + grace_s:
        time.sleep(POLL_S)  # one in the driver's hands ends when the driver lets it go


def _send(processes: Mapping[int, float], number: signal.Signals) -> None:
    for pid, started in processes.items():
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)  # from here on the pid cannot become another process
            try:
                if is_alive(pid, started):
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)
