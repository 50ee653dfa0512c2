"""The two ways to have a Prefect server: one process on SQLite, and what `deployments/compose.yaml` starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.compose import GIVEN, production
from tests.support.prefect_server import post, prefect_server
from tests.support.processes import Mark


class Installation(NamedTuple):
    kill: Callable[[], None]
    start: Callable[[], None]
    variables: dict[str, str]

    def post(self, path: str, body: Any) -> Any:
        user, _, password = self.variables.get("PREFECT_API_AUTH_STRING", ":").partition(":")
        url = f"{self.variables['PREFECT_API_URL']}/{path}"
        return post(url, body, (user, password))

    def states(self, what: str) -> set[str]:
        """Of all its flow runs or task runs."""
        return {one["state_name"] for one in self.post(f"{what}/filter", {})}


@contextmanager
def on_sqlite(folder: Path, mark: Mark) -> Iterator[Installation]:
    with prefect_server(folder) as server:
        yield Installation(server.kill, server.start, {"PREFECT_API_URL": server.api_url})


@contextmanager
def on_postgresql_and_redis(folder: Path, mark: Mark) -> Iterator[Installation]:
    with production(folder, mark.env) as made:
        variables = {"PREFECT_API_URL": made.api_url("proxy"), "PREFECT_API_AUTH_STRING": GIVEN["PREFECT_AUTH"]}
        yield Installation(made.kill_all_apis, made.start_all_apis, variables)
