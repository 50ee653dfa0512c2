"""A whole installation for a minute: a Prefect server, two workers as nodes, every deployment, and one evaluation.

    .venv/bin/python scripts/prefect_demo.py [--pictures FOLDER] [--stay]

Runs `modal-eval init`, `prefect --no-prompt deploy --all` and `prefect deployment run eval/demo` with the small model that
comes as a package. Every process it starts is gone when it ends; the run stays in `outputs/evals/`. Exits 1 unless the run
is Completed. `--pictures` photographs the flow run, its artifacts and the deployment's form; `--stay` serves until Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from modal_eval.cli.prefect_server import wait_until_healthy
from modal_eval.processes import OwnedProcess, free_port

ROOT = Path(__file__).resolve().parents[1]
MODEL = "SmolLM2-135M-Instruct"
NODES = ("node-1", "node-2")
WITHIN_S = 900.0
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


class Installation:
    """Asks the server that it was given."""

    def __init__(self, root_url: str, folder: Path) -> None:
        self.ui = root_url
        self.api = f"{root_url}/api"
        self.folder = folder
        self.env = {
            **os.environ,
            "PREFECT_API_URL": self.api,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_UI_API_URL": self.api,
            "PREFECT_UI_STATIC_DIRECTORY": str(folder / "ui"),  # else it is written into the installed package
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MODAL_EVAL_OUTPUT_DIR": os.environ.get("MODAL_EVAL_OUTPUT_DIR") or str(ROOT / "outputs" / "evals"),
            "DO_NOT_TRACK": "1",
        }

    def run(self, *command: str) -> None:
        """Run a command as a person would type it."""
        say(f"$ {' '.join(command)}")
        words = [sys.executable, "-m", "modal_eval.cli" if command[0] == "modal-eval" else "prefect", *command[1:]]
        done = subprocess.run(
            words, cwd=ROOT, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.api}/{path}", timeout=60).raise_for_status().json()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(f"{self.api}/{path}", json=body, timeout=60).raise_for_status().json()

    def newest_run(self) -> dict[str, Any]:
        asked = {"flows": {"name": {"any_": ["eval"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
        return dict(self.post("flow_runs/filter", asked)[0])

    def wait(self) -> dict[str, Any]:
        """The evaluation's flow run once it has ended; each of its states is told."""
        told, deadline = "", time.monotonic() + WITHIN_S
        while time.monotonic() < deadline:
            run = self.newest_run()
            if told != (told := f"{run['name']}: {run['state_name']}"):
                say(told)
            if run["state_type"] in ENDED:
                return run
            time.sleep(0.5)
        raise SystemExit(f"{told}, for {WITHIN_S:g} s; the workers' logs are in {self.folder}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[Installation]:
    """A server and a worker for each node; gone after the block."""
    port = free_port()
    here = Installation(f"http://127.0.0.1:{port}", folder)
    log = folder / "prefect-server.log"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OwnedProcess.start(command, log_path=log, env=here.env))
        wait_until_healthy(server, here.api, log)
        say(f"Prefect: {here.ui}")
        here.run("modal-eval", "init")
        here.run("prefect", "--no-prompt", "deploy", "--all")
        for name in NODES:
            state = {
                "MODAL_EVAL_STATE_DIR": str(folder / name / "state"),
                "MODAL_EVAL_GPU_DIR": str(folder / name / "gpus"),
            }
            worker = [sys.executable, "-m", "modal_eval.cli", "worker", "--pool", "a100", "--name", name]
            stack.enter_context(
                OwnedProcess.start(worker, log_path=folder / f"{name}.log", env={**here.env, **state}, grace_s=120)
            )
            say(f"{name} serves the work pool a100")
        yield here


def photograph(here: Installation, run: dict[str, Any], folder: Path) -> None:
    """Pictures of what a person sees."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "prefect-flow-run": f"runs/flow-run/{run['id']}",
        "prefect-form": f"deployments/deployment/{run['deployment_id']}/run",
    }
    for one in here.post("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}):
        pages[f"prefect-{one['key']}"] = f"artifacts/artifact/{one['id']}"
    for name, page in pages.items():
        subprocess.run(
            [ROOT / "scripts" / "screenshot", f"{here.ui}/{page}", folder / f"{name}.png", "1400x1000"],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        say(f"{folder / name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, metavar="FOLDER")
    parser.add_argument("--stay", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="prefect-demo-") as folder, installed(Path(folder)) as here:
        here.run("prefect", "deployment", "run", "eval/demo", "--param", f"model={MODEL}")
        run = here.wait()
        if given.pictures:
            photograph(here, run, given.pictures)
        if given.stay:
            say(f"{here.ui}/runs/flow-run/{run['id']} until Ctrl-C")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
    return 0 if run["state_type"] == "COMPLETED" else 1


if __name__ == "__main__":
    sys.exit(main())
