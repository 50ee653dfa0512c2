"""The part of the sandbox that runs inside it: one fork per test, limits, one JSON line per outcome.

Started as `python -c` with this file's text, so it imports the standard library only and nothing of modal_eval. It reads
one request from standard input. It judges nothing and knows no expected value.
"""

import contextlib
import json
import os
import resource
import selectors
import signal
import sys
import time
from typing import Any

STDERR_KEPT = 2_000
EQUALS_EVERYTHING = "returned an object that equals everything"


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    channel = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nothing, fd)
    send(channel, {"ready": True})
    deadline = time.monotonic() + request["limits"]["total_wall_s"]
    for index, test in enumerate(request["tests"]):
        row = run_test(request, test, channel, deadline)
        if request["isolated"]:
            sweep()
        send(channel, {"test": index, **row})
        if row["status"] == "timeout":
            break


def send(channel: int, row: dict[str, Any]) -> None:
    data = json.dumps(row).encode() + b"\n"
    while data:
        data = data[os.write(channel, data) :]


def sweep() -> None:
    """End whatever a test left running. Only in a process namespace of our own, where everything else is the test's."""
    with open("/proc/1/cmdline", "rb") as file:  # noqa: PTH123 - pathlib takes longer to import than a sample to run
        if b"bwrap" not in file.read():
            return
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass


def run_test(request: dict[str, Any], test: Any, channel: int, deadline: float) -> dict[str, Any]:
    """Fork, run one test, and say what it did."""
    limits = request["limits"]
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    stdin = stdin_file(test if request["kind"] == "program" else "")
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            os.close(channel)
            enter_child(stdin, out_write, err_write, request)
            code = program(request) if request["kind"] == "program" else call(request, test, out_write)
        finally:
            os._exit(code)
    for fd in (stdin, out_write, err_write):
        os.close(fd)
    out, err, status, usage, reason = watch(pid, out_read, err_read, limits, min(deadline, started + limits["wall_s"]))
    row: dict[str, Any] = {
        "status": reason or verdict(status, usage, limits),
        "stderr": err.decode(errors="replace")[-STDERR_KEPT:],
        "exit_code": None if reason else os.waitstatus_to_exitcode(status),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 4),
        "wall_s": round(time.monotonic() - started, 4),
    }
    if request["kind"] == "program":
        return {**row, "stdout": out.decode(errors="replace")}
    return {**row, **returned(row["status"], out)}


def stdin_file(text: str) -> int:
    """A file, not a pipe: a program need not read its input for us to go on."""
    fd = os.memfd_create("stdin")
    data = text.encode("utf-8", "surrogatepass")
    while data:
        data = data[os.write(fd, data) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def enter_child(stdin: int, out: int, err: int, request: dict[str, Any]) -> None:
    """Redirect the standard streams and give up what the limits take. For a call, `out` carries the result alone."""
    kind, limits = request["kind"], request["limits"]
    os.dup2(stdin, 0)
    if kind == "program":
        os.dup2(out, 1)
    os.dup2(err, 2)
    for fd in range(3, 64):
        if kind == "program" or fd != out:
            with contextlib.suppress(OSError):
                os.close(fd)
    set_limits(limits, max(1, -(-limits["cpu_s"] // 1)), isolated=request["isolated"])
    sys.stdin = open(0, encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115


def set_limits(limits: dict[str, Any], cpu_s: float, *, isolated: bool) -> None:
    """Give up, for this process and all that it starts, what the limits take."""
    # Without a user namespace of our own the kernel would count every process of this user.
    processes = limits["max_processes"] if isolated else resource.RLIM_INFINITY
    for what, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_FSIZE, limits["disk_bytes"], limits["disk_bytes"]),
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        # A limit above the one that we were given ourselves is refused; then the lower one stays.
        with contextlib.suppress(ValueError):
            resource.setrlimit(what, (int(soft), int(hard)))


def namespace(request: dict[str, Any], name: str) -> dict[str, Any]:
    """The code's globals after running it as the module `name`."""
    module = type(sys)(name)
    sys.modules[name] = module
    if request["prelude"]:
        exec(compile(request["prelude"], "<prelude>", "exec"), module.__dict__)  # noqa: S102
    exec(compile(request["source"], "<code>", "exec"), module.__dict__)  # noqa: S102
    return module.__dict__


def program(request: dict[str, Any]) -> int:
    """Run the code as a script; its exit code."""
    code = 0
    try:
        namespace(request, "__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is its result
        report(error)
        code = 1
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # the code closed it, or printed too much and nobody listens
        code = code or 1
    return code & 0xFF


def find_function(scope: dict[str, Any], name: str) -> Any:
    """A global function, or a method of a new `Solution`, as competition sites ask for."""
    if name in scope:
        return scope[name]
    if "Solution" in scope:
        return getattr(scope["Solution"](), name)
    raise NameError(f"the code defines no function {name!r}")


def call(request: dict[str, Any], arguments: list[Any], channel: int) -> int:
    """Run the code as a module, call the function, and write its result as JSON."""
    try:
        value = find_function(namespace(request, "solution"), request["name"])(*arguments)
    except BaseException as error:  # noqa: BLE001 - whatever the code raises is its result
        report(error)
        return 1
    try:
        text = json.dumps(value)
    except BaseException:  # noqa: BLE001
        text = EQUALS_EVERYTHING if equals_everything(value) else "unserialisable"
    data = text.encode()
    while data:
        data = data[os.write(channel, data) :]
    return 0


def equals_everything(value: Any) -> bool:
    try:
        kind: Any = type(value)
        return bool(kind.__eq__(value, object()) is True)
    except BaseException:  # noqa: BLE001 - the code of a stranger
        return False


def report(error: BaseException) -> None:
    """Write the traceback as the code's author would see it, without the frames of this file."""
    with contextlib.suppress(BaseException):
        import traceback

        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename not in ("<code>", "<prelude>"):
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        sys.stderr.flush()


def watch(
    pid: int, out_read: int, err_read: int, limits: dict[str, Any], deadline: float
) -> tuple[bytes, bytes, int, resource.struct_rusage, str | None]:
    """Collect output until the test's own process has ended or a limit is reached; then kill its group."""
    out, err = bytearray(), bytearray()
    reason: str | None = None
    ended: tuple[int, resource.struct_rusage] | None = None
    with selectors.DefaultSelector() as selector:
        for fd in (out_read, err_read):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        while ended is None and reason is None:
            if selector.get_map():
                selector.select(0.02)
            else:
                time.sleep(0.002)
            finished, status, usage = os.wait4(pid, os.WNOHANG)
            for fd, kept in ((out_read, out), (err_read, err)):
                if not drain(fd, kept, limits["output_bytes"]) and fd in selector.get_map():
                    selector.unregister(fd)
            del err[: -STDERR_KEPT * 4]
            if len(out) > limits["output_bytes"]:
                reason = "output"
            elif finished:
                ended = status, usage
            elif time.monotonic() > deadline:
                reason = "timeout"
    if ended is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
        ended = status, usage
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    os.close(out_read)
    os.close(err_read)
    return bytes(out), bytes(err), ended[0], ended[1], reason


def drain(fd: int, kept: bytearray, most: int) -> bool:
    """Read what is there; False at the end of the stream. Stops soon after `most` bytes, so memory stays bounded."""
    while len(kept) <= most:
        try:
            chunk = os.read(fd, 65_536)
        except BlockingIOError:
            return True
        if not chunk:
            return False
        kept += chunk
    return True


def verdict(status: int, usage: resource.struct_rusage, limits: dict[str, Any]) -> str:
    """How a test that ended by itself ended."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU or usage.ru_utime + usage.ru_stime > limits["cpu_s"]:
        return "timeout"
    return "ok" if code == 0 else "error"


def returned(status: str, data: bytes) -> dict[str, Any]:
    """The result of a call, and a status where there is none."""
    if status != "ok":
        return {"value": None}
    if not data:
        return {"status": "no_result", "value": None}
    try:
        return {"value": json.loads(data)}
    except ValueError:
        forged = data == EQUALS_EVERYTHING.encode()
        return {"status": "unserialisable", "value": None, **({"tampered": EQUALS_EVERYTHING} if forged else {})}


if __name__ == "__main__":
    main()
