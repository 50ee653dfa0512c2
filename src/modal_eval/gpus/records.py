"""What is known of a GPU, its processes and who holds it."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modal_eval.processes import boot_id, is_alive, start_ticks

FREE_MIB = 64
"""An idle GPU shows 0 to 20 MiB of the driver's own; the smallest CUDA context takes some 200."""


@dataclass(frozen=True)
class GpuProcess:
    """A process that has memory on a GPU. `None` is what the driver does not tell."""

    pid: int
    user: str | None
    used_mib: int | None
    name: str
    started_at: str | None


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver describes it. `None` is what it does not tell."""

    index: int
    """In the order of the PCI bus, as `nvidia-smi` counts."""
    uuid: str
    name: str
    total_mib: int | None
    used_mib: int | None
    utilization: int | None
    """Percent of the last sampling period in which a kernel ran."""
    processes: tuple[GpuProcess, ...] = ()
    mig: bool = False
    """Cut into instances, which are somebody's own arrangement: such a GPU is listed and never taken."""

    @property
    def quiet(self) -> bool:
        """Nobody uses it: no process, and no more memory than the driver's own.

        A container does not see the processes of others, but their memory; a machine whose GPU shares the host's
        memory tells no memory, but processes.
        """
        return not self.mig and not self.processes and (self.used_mib or 0) <= FREE_MIB


@dataclass(frozen=True)
class Holder:
    """Who holds a GPU, or waits for some: the text of a lease file or of a ticket."""

    lease_id: str
    run: str
    what: str
    pid: int
    started: float
    boot_id: str
    pid_namespace: str
    user: str
    since: str

    @classmethod
    def me(cls, lease_id: str, run: str, what: str) -> Holder:
        return cls(
            lease_id=lease_id,
            run=run,
            what=what,
            pid=os.getpid(),
            started=start_ticks(os.getpid()),
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            user=user_of(os.getpid()) or str(os.getuid()),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def read(cls, text: dict[str, Any]) -> Holder | None:
        """The holder in `text`; `None` when it is not whole (its writer was killed half-way)."""
        try:
            return cls(**{name: text[name] for name in cls.__dataclass_fields__})
        except KeyError:
            return None

    @property
    def alive(self) -> bool:
        """Whether the holder itself still runs. One in another container cannot be looked up and is taken to be."""
        if self.boot_id != boot_id():
            return False
        return self.pid_namespace != pid_namespace() or is_alive(self.pid, self.started)

    def __str__(self) -> str:
        gone = "" if self.alive else ", which is gone"
        what = f" for {self.what}" if self.what else ""
        return f"{self.run}{what} ({self.user}, pid {self.pid}{gone}, since {self.since})"


def pid_namespace() -> str:
    """Names the container: a pid means nothing in another one."""
    return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no file system knows the target


def user_of(pid: int) -> str | None:
    """The user of a process by name, by number where the machine has no name for it; `None` when it cannot be seen."""
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
