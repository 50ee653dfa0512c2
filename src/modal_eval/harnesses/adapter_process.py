"""One adapter process: heard through a pipe, watched through a shared page, and gone afterwards with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

from modal_eval import paths
from modal_eval.errors import HarnessError
from modal_eval.harnesses.adapters.stepping import PAGE, StepPage, Tag
from modal_eval.processes import OwnedProcess, is_alive
from modal_eval.records import SERVER_KEY_PREFIX

ENTRY = Path(__file__).parent / "adapters" / "run.py"
LOG_NAME = "vf_eval.log"
TERM_GRACE_S = 10.0
"""Time in which environments may give back what they hold elsewhere: containers, remote sandboxes."""
NOT_FOR_ADAPTERS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__")
"""Variables that would mix our environment into the harness's."""


def withheld(name: str) -> bool:
    """Whether a variable of ours is none of the adapter's business: a server's key is the proxy's alone."""
    return name in NOT_FOR_ADAPTERS or name.startswith(SERVER_KEY_PREFIX)


Event = dict[str, Any]


class AdapterProcess:
    """A running adapter; use it as a context manager, and nothing of it is left behind."""

    def __init__(self, python: Path, job_line: dict[str, Any], run_dir: Path) -> None:
        self.log_path = paths.logs_dir(run_dir) / LOG_NAME
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._page_file = tempfile.NamedTemporaryFile(prefix="modal-eval-steps-")  # noqa: SIM115 - closed in `end`
        self._page_file.truncate(PAGE)
        self._page = StepPage(self._page_file.fileno())
        environment = {key: value for key, value in os.environ.items() if not withheld(key)}
        try:
            self._owned = OwnedProcess.start(
                [str(python), str(ENTRY)],
                log_path=self.log_path,
                env={**environment, "PYTHONUNBUFFERED": "1", "MODAL_EVAL_RUN_ID": run_dir.name},
                stdin_pipe=True,
                stdout_pipe=True,
                grace_s=TERM_GRACE_S,
            )
        except OSError as error:
            self._page_file.close()
            raise HarnessError(
                f"the harness's Python {python} does not start: {error}; check eval.environment, or remove that folder "
                "and run again, so that it is made anew"
            ) from error
        self.pid = self._owned.pid
        # Closed here and not by `stop`, because the reader is in it.
        self._stdout, self._owned.stdout = self._owned.stdout, None
        # Bounded: a host that is slow to write rows holds the adapter back instead of piling them up.
        self._events: queue.Queue[Event] = queue.Queue(maxsize=1000)
        self._deaf = False
        self._reader = threading.Thread(target=self._read, name="adapter-events", daemon=True)
        self._reader.start()
        self._send({**job_line, "page_path": self._page_file.name})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def _send(self, job_line: dict[str, Any]) -> None:
        # A process that died at once is reported by its exit and its log, not by our broken pipe.
        with contextlib.suppress(BrokenPipeError):
            assert self._owned.stdin is not None
            self._owned.stdin.write(json.dumps(job_line).encode() + b"\n")
            self._owned.stdin.flush()

    def _read(self) -> None:
        assert self._stdout is not None
        for line in self._stdout:
            if line.endswith(b"\n"):  # else torn by a kill, and the rollout is owed again
                self._put(json.loads(line))

    def _put(self, event: Event) -> None:
        while not self._deaf:
            with contextlib.suppress(queue.Full):
                self._events.put(event, timeout=0.1)
                return

    def next_event(self, timeout: float) -> Event | None:
        """The next event, or `None` when there was none in time."""
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            return None

    def is_over(self) -> bool:
        """Whether the process has ended and all its events were taken."""
        return self._owned.poll() is not None and not self._reader.is_alive() and self._events.empty()

    def blocked_for(self) -> tuple[Tag, float] | None:
        """The rollout whose code is running now, and for how many seconds without a break."""
        step = self._page.read()
        return (step[0], time.monotonic() - step[1]) if step else None

    def kill(self) -> None:
        """End it without asking: a blocked process cannot hear."""
        if is_alive(self.pid, self._owned.started):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        """End the process and everything that it started; may be called twice."""
        self._deaf = True
        self._owned.stop()
        self._reader.join()
        if self._stdout is not None:
            self._stdout.close()
        self._page_file.close()

    def describe_exit(self) -> str:
        code = self._owned.wait()
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"exited with status {code}"

    def log_tail(self, lines: int = 12) -> str:
        """The last lines that this process wrote to the log."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - 8192))
            text = log.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-lines:])
