"""`modal-eval node`: the team's machines, each with a worker that takes runs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import httpx
from cyclopts import App, Parameter, validators
from rich.table import Table

from modal_eval import paths
from modal_eval.checkout import revision_of
from modal_eval.cli.evaluating import require_prefect
from modal_eval.cli.init import from_checkout
from modal_eval.cli.options import Json
from modal_eval.cli.output import complain, data, print_json, talk
from modal_eval.errors import EXIT_DONE, ConfigError, NodeError
from modal_eval.nodes import Facts, Host, Service, inspect, install_checkout
from modal_eval.nodes.service import install_environment

ONLINE_WITHIN_S = 240.0
"""A worker's first start on a busy machine compiles Prefect."""
POLL_S = 0.5
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
"""What Prefect takes as the name of a block, by which the node is known afterwards."""
GB = 10**9

Name = Annotated[str, Parameter(help="Name of the node, as `modal-eval node list` shows it.")]

command = App(name="node", help="The team's machines: a worker on each, looked after over the system's ssh.")


@command.command
def add(
    host: Annotated[str, Parameter(help="Name or address, or a Host of ~/.ssh/config. Its key has to be known.")],
    /,
    *,
    name: Annotated[str | None, Parameter(name="--name", help="How it is called here; else as its host.")] = None,
    user: Annotated[str | None, Parameter(name="--user", help="User there; else as ssh is configured.")] = None,
    port: Annotated[
        int | None,
        Parameter(
            name="--port",
            validator=validators.Number(gte=1, lte=65535),
            help="Port of its sshd; else as ssh is configured.",
        ),
    ] = None,
    home: Annotated[
        str | None, Parameter(name="--home", help="Absolute path of the checkout there; else that of this one.")
    ] = None,
    python: Annotated[
        str | None,
        Parameter(name="--python", help="Absolute path of a Python there with modal-eval; else the checkout's."),
    ] = None,
    install: Annotated[
        bool,
        Parameter(name="--install", help="Put this checkout's revision there and make its environment, if missing."),
    ] = False,
    pool: Annotated[str, Parameter(name="--pool", help="Work pool that its worker serves.")] = "a100",
    queue: Annotated[
        list[str] | None, Parameter(name="--queue", help="Only this queue; may be given again. Else all by priority.")
    ] = None,
    limit: Annotated[
        int,
        Parameter(
            name="--limit", validator=validators.Number(gte=1), help="Runs at a time; GPUs are shared by their leases."
        ),
    ] = 8,
    min_free: Annotated[float, Parameter(name="--min-free", help="Least free disk under the checkout, in GB.")] = 5,
    api_url: Annotated[
        str | None, Parameter(name="--api-url", help="The Prefect API as the node reaches it; else PREFECT_API_URL.")
    ] = None,
    env: Annotated[
        list[str] | None, Parameter(name="--env", help="NAME=VALUE for the worker and its runs; may be given again.")
    ] = None,
) -> int:
    """Start a worker on a machine as a service that comes back after a reboot, or start it anew with other settings."""
    name = name_for(host, name)
    here = require_prefect("a node")
    home = absolute("--home", home or str(paths.project_root()))
    python = absolute("--python", python or f"{home}/.venv/bin/python")
    variables = {
        "PREFECT_API_URL": api_url or here,
        "MODAL_EVAL_HOME": home,
        **secrets_of_prefect(),
        **pairs(env or []),
    }
    there = Host(host, user, port)
    facts = ready(there, home, python, min_free, install=install)
    arguments = ["--pool", pool, "--name", name, "--limit", str(limit), *(f"--queue={one}" for one in queue or [])]
    node = from_checkout("blocks").Node(  # checks what it holds, and so before anything is started
        host=host, user=user, port=port, home=home, python=python, work_pool=pool, work_queues=queue or [], limit=limit,
        systemd=facts.has_systemd, revision=facts.revision or None, gpus=list(facts.gpus),
    )  # fmt: skip
    service = Service.of(there, name, home, python, tuple(arguments), systemd=facts.has_systemd)
    with gone_if_not_added(name, service):
        began = datetime.now(UTC)
        notes = service.start(variables)
        wait_until_online(pool, name, began, service)
        from_checkout("blocks").register_all()
        node.save(name, overwrite=True)
    kind = "a systemd user unit" if facts.has_systemd else "a supervised process"
    data.print(f"{name}: modal-eval {facts.version}, {gpus_text(facts.gpus)}, {pool}, {kind}", soft_wrap=True)
    for note in notes:
        complain(f"{name}: {note}")
    return EXIT_DONE


def name_for(host: str, given: str | None) -> str:
    """The name that was given, else one made of its host. Raises `ConfigError` for one that Prefect would not take."""
    name = re.sub(r"[^a-z0-9-]+", "-", host.lower()).strip("-") if given is None else given
    if not NAME.fullmatch(name):
        what = f"'{name}' is no name for a node" if given is not None else f"no name for a node can be made of '{host}'"
        raise ConfigError(f"{what}; give --name of small letters, digits and '-', such as gpu-node-1")
    return name


@contextmanager
def gone_if_not_added(name: str, service: Service) -> Iterator[None]:
    """Remove the service of a new node when the block does not get to its end: no command would know of it any more."""
    is_new = name not in nodes()
    try:
        yield
    except BaseException:
        if is_new:
            try:
                service.remove()
            except NodeError as error:
                complain(f"the service of {name} may still be there: {error}")
        raise


def ready(there: Host, home: str, python: str, min_free: float, *, install: bool) -> Facts:
    """What the node has, once it has all that a worker needs. Raises `NodeError` naming what is missing."""
    facts = inspect(there, home, python)
    if facts.system != "Linux":
        raise NodeError(f"{there.name} runs {facts.system or 'an unknown system'}; a node is a Linux machine")
    if facts.free_bytes < min_free * GB:
        raise NodeError(
            f"{there.name} has no room: {facts.free_bytes / GB:.1f} GB are free under {home}, and --min-free={min_free:g} GB "
            "are wanted; free some, or name another folder by --home"
        )
    if install and not facts.has_checkout:
        talk.print(f"putting this revision into {home} on {there.name} …", soft_wrap=True)
        install_checkout(there, home)
    if install and not facts.version and python == f"{home}/.venv/bin/python":
        talk.print(f"making {home}/.venv on {there.name} …", soft_wrap=True)
        install_environment(there, home)
    facts = inspect(there, home, python) if install else facts
    if not facts.has_checkout:
        raise NodeError(
            f"there is no checkout of modal-eval in {home} on {there.name}; add --install, or name it by --home"
        )
    if not facts.version:
        raise NodeError(
            f"there is no Python with modal-eval at {python} on {there.name}; `make setup` in {home} makes one, or name another "
            "by --python"
        )
    here = revision_of(paths.project_root())
    if here and facts.revision and facts.revision != here:
        raise NodeError(
            f"{there.name} is at revision {facts.revision[:12]} and this checkout at {here[:12]}; runs of both may not meet in one "
            f"history: `git checkout {here[:12]}` in {home} there"
        )
    return facts


@command.command(name="list")
def list_nodes(*, json: Json = False) -> int:
    """Show every node: whether its worker is there, its GPUs, the revision that it was started with."""
    require_prefect("a node")
    rows = [describe(name, node) for name, node in sorted(nodes().items())]
    if json:
        print_json(rows)
        return EXIT_DONE
    shown = Table("node", "host", "pool", "worker", "last heard", "revision", "gpus", box=None, pad_edge=False)
    for row in rows:
        cells = [
            row["node"],
            row["host"],
            row["pool"],
            row["worker"],
            row["last_heard"] or "never",
            row["revision"] or "?",
        ]
        shown.add_row(*cells, gpus_text(row["gpus"]))
    data.print(shown) if rows else talk.print("No node has been added: `modal-eval node add HOST`")
    return EXIT_DONE


@command.command
def drain(name: Name, /) -> int:
    """Have a node finish what it runs and take nothing new, also after a reboot. `node add` brings it back."""
    require_prefect("a node")
    node = one(name)
    service_of(name, node).signal("drain")
    node.draining = True
    node.save(name, overwrite=True)
    data.print(f"{name} finishes what it runs and takes nothing new", soft_wrap=True)
    return EXIT_DONE


@command.command
def remove(
    name: Name,
    /,
    *,
    forget: Annotated[
        bool,
        Parameter(name="--forget", help="Only forget it, and do not go there: the machine is gone or was set up anew."),
    ] = False,
) -> int:
    """Stop a node's worker, remove its service and forget the node. Its runs give their servers back and count as crashed.

    `node drain` first lets them finish. The checkout on the node stays.
    """
    require_prefect("a node")
    node = one(name)
    if not forget:
        try:
            service_of(name, node).remove()
        except NodeError as error:
            raise NodeError(
                f"{error}\nA machine that is gone needs no more: `modal-eval node remove {name} --forget`"
            ) from error
    from_checkout("blocks").Node.delete(name)
    became = "forgotten; a worker of it that still runs goes on" if forget else "removed"
    data.print(f"{name} is {became}", soft_wrap=True)
    return EXIT_DONE


def describe(name: str, node: Any) -> dict[str, Any]:
    worker = next((one for one in workers(node.work_pool) if one["name"] == name), None)
    status = worker["status"].lower() if worker else "offline"
    if node.draining:
        status = "draining" if status == "online" else "drained"
    heard = worker["last_heartbeat_time"] if worker else None
    return {
        "node": name, "host": node.host, "pool": node.work_pool, "worker": status, "last_heard": heard and heard[:19],
        "revision": node.revision and node.revision[:12], "gpus": node.gpus,
    }  # fmt: skip


def gpus_text(gpus: list[str] | tuple[str, ...]) -> str:
    """`8× NVIDIA A100-SXM4-80GB`."""
    kinds = sorted(set(gpus))
    return ", ".join(f"{list(gpus).count(kind)}× {kind}" for kind in kinds) or "no GPU"


def nodes() -> dict[str, Any]:
    """Every node that was added, by name."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    block = from_checkout("blocks").Node
    with get_client(sync_client=True) as client:
        try:
            found = client.read_block_documents_by_type(block.get_block_type_slug())
        except PrefectHTTPStatusError as error:
            if error.response.status_code != httpx.codes.NOT_FOUND:
                raise
            return {}  # no node was ever added, so nobody has registered the type
    return {document.name: block.load(document.name) for document in found if document.name}


def one(name: str) -> Any:
    known = nodes()
    if name not in known:
        raise ConfigError(f"there is no node called {name}; known are {', '.join(sorted(known)) or 'none'}")
    return known[name]


def service_of(name: str, node: Any) -> Service:
    return Service.of(Host(node.host, node.user, node.port), name, node.home, node.python, (), systemd=node.systemd)


def workers(pool: str) -> list[dict[str, Any]]:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            found = client.request(
                "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": pool}, json={}
            )
        except (ObjectNotFound, PrefectHTTPStatusError):
            return []
    return list(found.json())


def wait_until_online(pool: str, name: str, began: datetime, service: Service) -> None:
    """Return once the Prefect server has heard from the new worker. Raises `NodeError` with the worker's last words."""
    deadline = time.monotonic() + ONLINE_WITHIN_S
    while time.monotonic() < deadline:
        for worker in workers(pool):
            heard = worker["name"] == name and datetime.fromisoformat(
                worker["last_heartbeat_time"].replace("Z", "+00:00")
            )
            if heard and heard >= began:
                return
        time.sleep(POLL_S)
    raise NodeError(
        f"the worker of {name} did not come up within {ONLINE_WITHIN_S:g} s; it said last: {service.last_words() or 'nothing'}"
    )


def secrets_of_prefect() -> dict[str, str]:
    """What a worker needs to be let in by the server, where it asks for something."""
    from prefect.settings import PREFECT_API_AUTH_STRING

    password = PREFECT_API_AUTH_STRING.value()
    return {"PREFECT_API_AUTH_STRING": password} if password else {}


def pairs(given: list[str]) -> dict[str, str]:
    for text in given:
        if "=" not in text:
            raise ConfigError(f"--env={text} is no NAME=VALUE")
    return dict(text.split("=", 1) for text in given)


def absolute(option: str, path: str) -> str:
    """Refuse what would mean another place with another working directory."""
    if not path.startswith("/"):
        raise ConfigError(f"{option}={path} is no absolute path; what is relative means another place for a service")
    return path.rstrip("/") or "/"
