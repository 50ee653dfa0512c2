"""`modal-eval init`: a Prefect server gets what the deployments of `prefect.yaml` stand on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import yaml
from cyclopts import Parameter

from modal_eval import paths
from modal_eval.cli.evaluating import require_prefect
from modal_eval.cli.output import talk
from modal_eval.errors import EXIT_DONE

POOLS = {
    "modal": "Runs that need no GPU of their machine: servers on Modal, suites, services. Give its workers no small limit.",
    "a100": "Runs on the team's nodes, one worker each; GPUs are shared by their leases.",
}
PRIORITIES = {
    "high": {"priority": 1, "description": "For people who wait"},
    "default": {"priority": 2, "description": "For everything else"},
    "nightly": {"priority": 3, "description": "When nobody waits"},
}
SUITES_AT_ONCE = 4
"""A worker takes eight runs at a time unless it is told otherwise: the suites' own benchmarks have to fit beside them."""
SUITES = {"priority": 4, "description": "Suites, each in a worker's slot while its benchmarks run elsewhere"}
MARK = "modal-eval"
"""Tag of deployments and automations that are ours: `--prune` looks at no other."""
PAGE = 200
LASTING = "prefect.server.concurrency.lease_storage.filesystem"
QUEUES = "/work_pools/{work_pool_name}/queues"


def command(
    *,
    prune: Annotated[
        bool,
        Parameter(name="--prune", help="Remove deployments and automations of ours that the checkout no longer has."),
    ] = False,
) -> int:
    """Set up a Prefect server: work pools, their queues, block types, automations.

    May be repeated: what is there is brought up to date, and what people changed by hand in a pool stays. Then
    `prefect --no-prompt deploy --all`, from the root of the checkout.
    """
    require_prefect("init")
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        make_pools(client)
        warn_of_forgetful(client)
        for slug in register_blocks():
            talk.print(f"block {slug}")
        make_automations(client, prune=prune)
        if prune:
            prune_deployments(client)
    return EXIT_DONE


def make_pools(client: Any) -> None:
    """Make what is missing; a pool that is there keeps its job template and its limits."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    for name, description in POOLS.items():
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            client.create_work_pool(
                WorkPoolCreate(name=name, type="process", description=description, base_job_template=template)
            )
        queues = {**PRIORITIES, "suites": SUITES} if name == "modal" else PRIORITIES
        make_queues(client, name, queues)
        talk.print(f"work pool {name}: {', '.join(queues)}")


def make_queues(client: Any, pool: str, queues: dict[str, dict[str, Any]]) -> None:
    """A queue that is there keeps its limit."""
    here = {"work_pool_name": pool}
    there = {one["name"] for one in client.request("POST", f"{QUEUES}/filter", path_params=here, json={}).json()}
    for name, facts in queues.items():
        if name in there:
            client.request("PATCH", f"{QUEUES}/{{name}}", path_params={**here, "name": name}, json=facts)
        else:
            limit = {"concurrency_limit": SUITES_AT_ONCE} if facts is SUITES else {}
            client.request("POST", QUEUES, path_params=here, json={"name": name, **facts, **limit})


def warn_of_forgetful(client: Any) -> None:
    """Warn of a server that forgets who holds a concurrency limit when it is started again."""
    storage = client.request("GET", "/admin/settings").json()["server"]["concurrency"]["lease_storage"]
    if storage.endswith(".memory"):
        talk.print(
            f"warning: this server keeps concurrency leases in its memory ({storage}); once it is started again, watch and janitor "
            "may wait for ever for one that it has forgotten. Start it with PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="
            f"{LASTING}, or in this checkout, whose pyproject.toml says so",
            soft_wrap=True,
        )


def from_checkout(module: str) -> Any:
    """A module of one of the checkout's folders, which are not installed."""
    root = str(paths.project_root())
    if root not in sys.path:
        sys.path.insert(0, root)
    return importlib.import_module(module)


def register_blocks() -> list[str]:
    slugs: list[str] = from_checkout("blocks").register_all()
    return slugs


def wanted_automations() -> list[dict[str, Any]]:
    path = paths.project_root() / "deployments" / "automations.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [{"enabled": True, **one, "tags": [MARK]} for one in found]


def make_automations(client: Any, *, prune: bool) -> None:
    """Make each automation, or bring the one of its name up to date; what a person has switched off stays off."""
    from prefect.events.schemas.automations import AutomationCore

    there = {one.name: one for one in client.read_automations(limit=200)}
    wanted = {one["name"]: one for one in wanted_automations()}
    for name, one in wanted.items():
        if before := there.get(name):
            automation = AutomationCore.model_validate({**one, "enabled": before.enabled})
            client.update_automation(before.id, automation)
        else:
            client.create_automation(AutomationCore.model_validate(one))
        talk.print(f"automation {name}")
    for name, before in there.items():
        if prune and MARK in before.tags and name not in wanted:
            client.delete_automation(before.id)
            talk.print(f"removed the automation {name}")


def wanted_deployments() -> dict[str, set[str]]:
    """`flow/name` of every deployment of `prefect.yaml`, with the slugs of its schedules."""
    document = yaml.safe_load((paths.project_root() / "prefect.yaml").read_text(encoding="utf-8"))
    return {
        f"{one['entrypoint'].rpartition(':')[2]}/{one['name']}": {each["slug"] for each in one.get("schedules", [])}
        for one in document["deployments"]
    }


def prune_deployments(client: Any) -> None:
    """Remove deployments of ours, and their schedules, that `prefect.yaml` no longer has: `deploy --all` leaves both."""
    wanted = wanted_deployments()
    flows = {flow.id: flow.name for flow in all_of(client.read_flows)}
    for one in all_of(client.read_deployments):
        name = f"{flows.get(one.flow_id)}/{one.name}"
        if MARK not in (one.tags or []):
            continue
        if name not in wanted:
            client.delete_deployment(one.id)
            talk.print(f"removed the deployment {name}")
            continue
        for schedule in one.schedules:
            if schedule.slug not in wanted[name]:
                client.delete_deployment_schedule(one.id, schedule.id)
                talk.print(f"removed a schedule of {name}")


def all_of(read: Callable[..., list[Any]]) -> list[Any]:
    """Everything, page by page."""
    found: list[Any] = []
    while page := read(limit=PAGE, offset=len(found)):
        found += page
    return found
