"""A real Prefect server with its UI, for tests and for pictures; the fixture `prefect_api` has one without.

`python -m tests.support.prefect_server FOLDER` serves until Ctrl-C and prints the API's URL.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from modal_eval.cli.prefect_server import wait_until_healthy
from modal_eval.processes import OwnedProcess, free_port


@dataclass(frozen=True)
class PrefectServer:
    api_url: str
    ui_url: str
    home: Path

    def flow_run_page(self, flow_run_id: str) -> str:
        return f"{self.ui_url}/runs/flow-run/{flow_run_id}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a process that reports to this server."""
        return {**os.environ, "PREFECT_API_URL": self.api_url, "PREFECT_HOME": str(self.home)}


@contextlib.contextmanager
def prefect_server(folder: Path) -> Iterator[PrefectServer]:
    """Serve from a process group of its own, with database and UI files in `folder`; gone after the block."""
    port = free_port()
    root = f"http://127.0.0.1:{port}"
    server = PrefectServer(f"{root}/api", root, folder / "prefect")
    env = {
        **server.env,
        "PREFECT_UI_API_URL": server.api_url,
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),  # else it is written into the installed package
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }
    server.home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app",
        "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", "--lifespan", "on",
    ]  # fmt: skip
    log = folder / "prefect-server.log"
    with OwnedProcess.start(command, log_path=log, env=env) as process:
        wait_until_healthy(process, server.api_url, log)
        yield server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with prefect_server(folder) as server, contextlib.suppress(KeyboardInterrupt):
        print(server.api_url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
