"""The services of `deployments/compose.yaml` as processes of this machine: their commands and variables, without containers."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from modal_eval.environments import ensure_environment
from modal_eval.processes import OwnedProcess, free_port, last_lines
from tests.support.processes import until

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "deployments" / "compose.yaml"
GIVEN = {
    "POSTGRES_PASSWORD": "hunter2", "PREFECT_AUTH": "team:opensesame", "PREFECT_URL": "http://127.0.0.1:4200",
}  # fmt: skip
POSTGRES_USER = "postgres"
REPLICAS = ("first", "second")


def services() -> dict[str, Any]:
    """The file's services with the variables of a `production.env` filled in."""

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match["name"], match["operator"], match["rest"]
        if name in GIVEN:
            return GIVEN[name]
        assert operator == ":-", f"{name} is asked for, and production.env.example does not have it"
        return str(rest)

    text = re.sub(r"\$\{(?P<name>\w+)(?P<operator>:[-?])?(?P<rest>[^}]*)\}", fill, FILE.read_text(encoding="utf-8"))
    return dict(yaml.safe_load(text)["services"])


def postgres_program(name: str) -> str:
    """One of PostgreSQL's programs; Debian does not put its server's on the path."""
    found = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), reverse=True)]
    path = next((each for each in found if each), None)
    if path is None:
        pytest.skip(f"{name} of PostgreSQL is not installed: scripts/install-system-packages --tests")
    return path


class Production:
    """Everything of the compose file but its worker and its containers."""

    def __init__(self, folder: Path, variables: Mapping[str, str], stack: ExitStack) -> None:
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed: scripts/install-system-packages --tests")
        self.folder, self.services, self._stack = folder, services(), stack
        self.given = variables
        self.ports = {name: free_port() for name in ("postgres", "redis", "proxy", *REPLICAS)}
        self.programs = ensure_environment("server").parent
        self.processes: dict[str, OwnedProcess] = {}
        folder.chmod(0o755)

    def api_url(self, replica: str) -> str:
        return f"http://127.0.0.1:{self.ports[replica]}/api"

    def variables(self, service: str) -> dict[str, str]:
        """What the service's container would have in its environment, with our places of the other services."""
        filled = {name: str(value) for name, value in self.services[service].get("environment", {}).items()}
        for name, value in filled.items():
            filled[name] = value.replace("redis:6379", f"127.0.0.1:{self.ports['redis']}")
        places = {
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1", "PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
            "PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"]), "PREFECT_HOME": str(self.folder / "home"),
        }  # fmt: skip
        return {
            **self.given,
            **filled,
            **{name: value for name, value in places.items() if name in filled or name == "PGPORT"},
        }

    def start(self, name: str, command: list[str], env: Mapping[str, str]) -> OwnedProcess:
        process = OwnedProcess.start(command, log_path=self.folder / f"{name}.log", env=env)
        self.processes[name] = self._stack.enter_context(process)
        return process

    def command(self, service: str, **changes: str) -> list[str]:
        words = [changes.get(word, word) for word in self.services[service]["command"]]
        return [str(self.programs / words[0]) if words[0] == "prefect" else words[0], *words[1:]]

    def make_database(self) -> None:
        data = self.folder / "data"
        data.mkdir()
        secret = self.folder / "password"
        secret.write_text(GIVEN["POSTGRES_PASSWORD"])
        for path in (data, secret):
            if os.geteuid() == 0:
                shutil.chown(path, POSTGRES_USER)
        command = [
            *as_postgres(), postgres_program("initdb"), f"--pgdata={data}", "--username=prefect", "--auth=scram-sha-256",
            f"--pwfile={secret}", "--no-sync",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd=data)

    def start_postgres(self) -> None:
        command = [
            *as_postgres(), postgres_program("postgres"), "-D", str(self.folder / "data"), "-h", "127.0.0.1", "-p",
            str(self.ports["postgres"]), "-k", "",
        ]  # fmt: skip
        self.start("postgres", command, self.given)
        self.until_it_answers("postgres", ["pg_isready"])

    def until_it_answers(self, name: str, command: list[str]) -> None:
        env = {**self.given, "PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        line = [postgres_program(command[0]), *command[1:]]
        until(lambda: subprocess.run(line, env=env, capture_output=True).returncode == 0, within=60)

    def start_redis(self) -> None:
        folder = self.folder / "messages"
        folder.mkdir(exist_ok=True)
        command = [
            *self.command("redis"),
            "--port",
            str(self.ports["redis"]),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
        ]
        self.start("redis", command, self.given)

    def run(self, service: str, *words: str) -> str:
        """Run a service that ends by itself; what it said."""
        command = list(words) or self.command(service)
        done = subprocess.run(command, env=self.variables(service), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def start_api(self, replica: str) -> None:
        changes = {"0.0.0.0": "127.0.0.1", "4200": str(self.ports[replica])}
        env = {**self.variables("api"), "PREFECT_UI_STATIC_DIRECTORY": str(self.folder / "ui" / replica)}
        process = self.start(replica, self.command("api", **changes), env)
        until(lambda: self.is_healthy(replica, process), within=180)

    def start_proxy(self) -> None:
        """With the file's own configuration, but for its port and for Docker's way to find the replicas."""
        if shutil.which("caddy") is None:
            pytest.skip("caddy is not installed: scripts/install-system-packages --tests")
        replicas = " ".join(f"127.0.0.1:{self.ports[replica]}" for replica in REPLICAS)
        text = yaml.safe_load(FILE.read_text(encoding="utf-8"))["configs"]["caddyfile"]["content"]
        text, found = re.subn(r"dynamic a api 4200 \{[^}]*\}", f"to {replicas}", text)
        assert found == 1
        assert text.startswith(":4200 {")
        config = self.folder / "Caddyfile"
        here = text.replace(":4200 {", f"http://127.0.0.1:{self.ports['proxy']} {{", 1)
        config.write_text(f"{{\n\tadmin off\n}}\n{here}")
        env = {
            **self.given,
            "HOME": str(self.folder),
            "XDG_DATA_HOME": str(self.folder),
            "XDG_CONFIG_HOME": str(self.folder),
        }
        process = self.start("proxy", ["caddy", "run", "--config", str(config), "--adapter", "caddyfile"], env)
        until(lambda: self.is_healthy("proxy", process), within=60)

    def start_all_apis(self) -> None:
        for replica in REPLICAS:
            self.start_api(replica)

    def kill_all_apis(self) -> None:
        """`kill -9`: what they had not written is lost."""
        for replica in REPLICAS:
            os.killpg(self.processes[replica].pid, signal.SIGKILL)
            self.processes[replica].stop()

    def is_healthy(self, replica: str, process: OwnedProcess) -> bool:
        assert process.poll() is None, last_lines(self.folder / f"{replica}.log", 30)
        try:
            return httpx.get(f"{self.api_url(replica)}/health", timeout=5).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False


def as_postgres() -> list[str]:
    """PostgreSQL's server refuses to be root's."""
    return ["setpriv", f"--reuid={POSTGRES_USER}", "--clear-groups", "--"] if os.geteuid() == 0 else []


@contextmanager
def production(folder: Path, variables: Mapping[str, str]) -> Iterator[Production]:
    """PostgreSQL, Redis, the migrated database, two API servers behind their proxy, and the services; all gone after it."""
    with ExitStack() as stack:
        made = Production(folder, variables, stack)
        made.make_database()
        made.start_postgres()
        made.start_redis()
        subprocess.run(
            [postgres_program("createdb"), "prefect"], check=True,
            env={**made.given, "PGHOST": "127.0.0.1", "PGPORT": str(made.ports["postgres"]), "PGUSER": "prefect",
                 "PGPASSWORD": GIVEN["POSTGRES_PASSWORD"]},
        )  # fmt: skip
        made.run("migrate")
        made.start_all_apis()
        made.start_proxy()
        made.start("services", made.command("services"), made.variables("services"))
        yield made
