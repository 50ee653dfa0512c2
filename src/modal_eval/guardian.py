"""Stands between us and a command, and ends the command's whole tree when we are gone.

Run as a script, without imports of ours so that it is up in milliseconds:
`python -I guardian.py OWNER_PID LIFELINE_FD REPORT_FD GRACE_S HELD_FDS -- COMMAND ...`. We alone hold the other end of
the lifeline pipe; the kernel closes it however we die, and that is the guardian's sign. (A fork of ours may hold a copy
of that end, so the guardian watches our pid as well.) As a subreaper it inherits orphans, so a worker that moved into a
session of its own is found too. If the guardian itself is killed, the kernel kills the command. HELD_FDS (numbers with
commas, or nothing) stay open here and in the command: a lock on them lasts until both have ended.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
POLL_S = 0.05


def die_with_parent(parent: int) -> None:
    """Runs in the child before exec: what we ignore it must not inherit as ignored, or SIGTERM would not end it."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_DFL)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def descendants() -> list[int]:
    """Every process below this one, by the kernel's own list of children."""
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
                with open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123 - a script of few imports
                    children = [int(child) for child in file.read().split()]
                found += children
                todo += children
        except OSError:  # the process ended while we looked
            continue
    return found


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(codes: dict[int, int]) -> None:
    """Collect the exit codes of our children, orphans that became ours among them."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])


def ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 0)[0])


def wait_for_an_end(lifeline: int, owner: int, command: int, alarm: int) -> None:
    """Return when the command or its owner has ended; bury orphans that end meanwhile."""
    while True:
        ready, _, _ = select.select([lifeline, owner, command, alarm], [], [])
        if ready != [alarm]:
            return
        os.read(alarm, 4096)
        while (orphan := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and not ended(command):
            os.waitpid(orphan.si_pid, os.WNOHANG)


def last_wish(lifeline: int, grace_s: float) -> float:
    """The grace that the owner wrote before it let go, otherwise the one it began with."""
    os.set_blocking(lifeline, False)
    with contextlib.suppress(BlockingIOError, ValueError):
        return float(os.read(lifeline, 64))
    return grace_s


def end_tree(leader: int, grace_s: float, codes: dict[int, int]) -> None:
    """TERM to the command's group, then KILL to everything that is left below us."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    reap(codes)
    while descendants() and time.monotonic() < deadline:
        time.sleep(POLL_S)
        reap(codes)
    while left := descendants():
        send(left, signal.SIGKILL)
        time.sleep(POLL_S / 5)
        reap(codes)


def tell(report: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody is left to hear it
        os.write(report, line.encode() + b"\n")


def start(command: list[str], report: int, held: list[int]) -> int:
    """Start the command in a session of its own and report its pid; 0 when it cannot be started."""
    me = os.getpid()
    try:
        child = subprocess.Popen(command, start_new_session=True, pass_fds=held, preexec_fn=lambda: die_with_parent(me))
    except OSError as error:
        tell(report, f"error {error.strerror or error}")
        return 0
    tell(report, f"pid {child.pid}")
    return child.pid


def main() -> int:
    owner_pid, lifeline, report, grace_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    held = [int(word) for word in sys.argv[5].split(",") if word]
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)  # only the lifeline decides
    alarm, bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(bell)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        owner = os.pidfd_open(owner_pid)
    except OSError:  # it is gone already
        return 0
    if os.getppid() != owner_pid or not (leader := start(sys.argv[7:], report, held)):
        return 127
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)  # the pipes belong to the command: its end must be seen as theirs
    command = os.pidfd_open(leader)
    wait_for_an_end(lifeline, owner, command, alarm)
    codes: dict[int, int] = {}
    end_tree(leader, 0 if ended(command) else last_wish(lifeline, grace_s), codes)
    tell(report, f"exit {codes.get(leader, -signal.SIGKILL)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
