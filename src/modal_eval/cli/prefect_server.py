"""Prefect's own server on its embedded database, as a process that ends with us.

Prefect's built-in temporary server outlives a killed client; this one is the same application under our guardian.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from modal_eval.errors import ServerError
from modal_eval.processes import OwnedProcess, free_port

STARTUP_TIMEOUT_S = 180
"""The first start makes the database, which took 46 s on a busy machine."""


@contextmanager
def embedded_server(log_path: Path) -> Iterator[str]:
    """Yield the API's URL once the server answers."""
    port = free_port()
    command = [
        sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on",
    ]  # fmt: skip
    env = {
        **os.environ,
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    process = OwnedProcess.start(command, log_path=log_path, env=env)
    try:
        api_url = f"http://127.0.0.1:{port}/api"
        wait_until_healthy(process, api_url, log_path)
        yield api_url
    finally:
        process.stop()


def wait_until_healthy(process: OwnedProcess, api_url: str, log_path: Path) -> None:
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            raise ServerError(f"Prefect's embedded server exited with {code}; its log is {log_path}")
        try:
            if httpx.get(f"{api_url}/health", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise ServerError(f"Prefect's embedded server did not answer within {STARTUP_TIMEOUT_S} s; its log is {log_path}")
