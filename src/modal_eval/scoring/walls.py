"""The command line of a sandbox: bubblewrap's walls, and the limits that the code behind them gets. Standard library only."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modal_eval.errors import SandboxError

Backend = Literal["local", "process"]
BACKENDS: tuple[Backend, ...] = ("local", "process")
NOBODY = 65534


@dataclass(frozen=True, slots=True)
class Limits:
    """What one test may use. CPU time decides; the wall clock only ends code that waits."""

    cpu_s: float = 10.0
    """CPU seconds of one test. A busy machine does not change the verdict."""
    wall_s: float | None = None
    """Seconds of one test by the clock; `None` takes six times the CPU limit and 10 s more."""
    total_wall_s: float = 600.0
    """Seconds by the clock for all tests of one sample."""
    memory_bytes: int = 1 << 30
    """Address space of one process."""
    max_processes: int = 16
    """Processes and threads of one sandbox together."""
    output_bytes: int = 8 << 20
    """Longest standard output, or JSON text of a result, of one test."""
    disk_bytes: int = 64 << 20
    """Size of the private /tmp."""

    @property
    def wall_limit_s(self) -> float:
        return self.cpu_s * 6 + 10 if self.wall_s is None else self.wall_s


def sandbox_python(backend: Backend, explicit: str | None = None) -> str:
    """The interpreter that untrusted code runs under.

    Not ours: an environment's interpreter often stands under a home folder, which `nobody` cannot read.
    """
    if explicit:
        return explicit
    if backend == "process":
        return sys.executable
    for candidate in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(candidate, os.X_OK):
            return candidate
    raise SandboxError("the sandbox needs a Python below /usr, and there is none; run `apt-get install python3`")


def sandbox_command(
    backend: Backend, python: str | None, limits: Limits, driver: str, mounts: Sequence[str] = ()
) -> list[str]:
    """The command line whose standard input takes one request and whose output gives one JSON line per test."""
    interpreter = [sandbox_python(backend, python), "-I", "-S", "-B", "-c", driver]
    if backend == "process":
        return interpreter
    if backend != "local":
        raise SandboxError(f"sandbox_backend={backend!r} does not exist; there are {', '.join(BACKENDS)}")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError(
            "bubblewrap is not installed, and untrusted code is not run without it: `apt-get install bubblewrap`, or "
            "accept a process without walls with --env.sandbox_backend=process"
        )
    walls = _walls(limits, mounts)
    if os.geteuid() != 0:
        return [bwrap, *OWN_NAMESPACE, *walls, *interpreter]
    # As root the process limit does nothing and files of root stay readable, so become nobody: before the walls where
    # nobody can reach the interpreter by itself, else behind them, because only root can mount it there.
    if all(_nobody_reaches(Path(each)) for each in mounts):
        return [*_as_nobody(), bwrap, *OWN_NAMESPACE, *walls, *interpreter]
    return [bwrap, *ROOTS_NAMESPACE, *walls, *_as_nobody("--bounding-set=-all", "--inh-caps=-all"), *interpreter]


OWN_NAMESPACE = ("--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL")
ROOTS_NAMESPACE = (
    "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
    "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP",
)  # fmt: skip


def _as_nobody(*more: str) -> list[str]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError("running as root, and setpriv is missing: `apt-get install util-linux`")
    ids = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
    return [setpriv, *ids, *more, "--"]


def _nobody_reaches(path: Path) -> bool:
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


def _mounts(mounts: Sequence[str]) -> list[str]:
    """Read-only mounts, with parents that everybody may pass through."""
    arguments: list[str] = []
    made: set[Path] = set()
    for mount in mounts:
        path = Path(mount)
        if path.is_relative_to("/usr"):
            continue
        for parent in reversed(path.parents[:-1]):
            if parent not in made:
                made.add(parent)
                arguments += ["--perms", "0755", "--dir", str(parent)]
        arguments += ["--ro-bind", mount, mount]
    return arguments


def _walls(limits: Limits, mounts: Sequence[str]) -> list[str]:
    size = str(limits.disk_bytes)
    return [
        "--die-with-parent", "--new-session", "--hostname", "sandbox",
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8",  # noqa: S108
        "--setenv", "PYTHONHASHSEED", "0", "--setenv", "OMP_NUM_THREADS", "1", "--setenv", "OPENBLAS_NUM_THREADS", "1",
        "--ro-bind", "/usr", "/usr", *_root_links(),
        "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind-try", "/etc/alternatives", "/etc/alternatives",
        "--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", size, "--tmpfs", "/dev/shm", "--perms", "1777", "--size", size, "--tmpfs", "/tmp",  # noqa: S108
        *_mounts(mounts),  # after /tmp, which a checkout may stand in
        "--chdir", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/", "--",  # noqa: S108
    ]  # fmt: skip


def _root_links() -> list[str]:
    """/bin, /lib and their like: links into /usr on most systems, folders on some."""
    arguments = []
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            arguments += ["--symlink", str(path.readlink()), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    return arguments
