"""`modal-eval worker`: take runs from a work pool of Prefect on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from modal_eval import paths
from modal_eval.cli.evaluating import require_prefect
from modal_eval.cli.init import from_checkout
from modal_eval.errors import EXIT_DONE, ConfigError
from modal_eval.processes import start_ticks


def command(
    *,
    pool: Annotated[str, Parameter(name="--pool", help="Work pool to take runs from; it is of type process.")],
    queue: Annotated[
        list[str] | None, Parameter(name="--queue", help="Only from this queue; may be given again. Else from all.")
    ] = None,
    name: Annotated[str | None, Parameter(name="--name", help="How it is called; else as this machine.")] = None,
    limit: Annotated[
        int,
        Parameter(
            name="--limit", validator=validators.Number(gte=1), help="Runs at a time. GPUs are shared by their leases."
        ),
    ] = 8,
    grace: Annotated[
        float, Parameter(name="--grace", help="Seconds that runs get to give their servers back when it is stopped.")
    ] = 120,
) -> int:
    """Take runs from a work pool until stopped.

    On SIGTERM or Ctrl-C it takes nothing more and asks its runs to end: they give their servers back and say that they
    crashed. On SIGUSR1 it takes nothing more and ends once they are done. A worker that is killed takes its runs with it,
    and one whose Prefect server is away goes on.
    """
    name = name or platform.node()
    require_prefect("a worker")
    import anyio

    with alone(name, pool):
        made = from_checkout("deployments.draining_worker").DrainingWorker(
            work_pool_name=pool, work_queues=queue, name=name, limit=limit, create_pool_if_not_found=False
        )
        made.grace_s = grace
        anyio.run(made.start)
    return EXIT_DONE


@contextmanager
def alone(name: str, pool: str) -> Iterator[Path]:
    """One worker of a name on this machine; its file says who it is. Raises `ConfigError` for a second one."""
    path = worker_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"a worker called {name} runs on this machine already: {path.read_text().strip()}"
            ) from None
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "started": start_ticks(os.getpid()), "pool": pool}) + "\n")
        file.flush()
        yield path


def worker_file(name: str) -> Path:
    return paths.state_dir() / "workers" / f"{name}.json"
