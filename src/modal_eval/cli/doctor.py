"""`modal-eval doctor`: whether this machine has what each way to a server needs, and how to mend what it lacks."""

from __future__ import annotations

import os
import shutil
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from modal_eval import gpus, paths
from modal_eval.cli.options import Json
from modal_eval.cli.output import data, print_json, talk
from modal_eval.config.models import InfraConfig
from modal_eval.errors import EXIT_DONE, EXIT_FAILED, ModalEvalError
from modal_eval.scoring.sandbox import Sandbox
from modal_eval.serving import modal_calls

Route = Literal["endpoint", "local", "node", "modal"]
State = Literal["ok", "missing"]
GB = 10**9
LEAST_DISK_GB = 20
"""vLLM's environment takes 10 GB and a small model's weights some more."""
TIMEOUT_S = 5.0
ASK_S = 15.0
"""Modal's client needs some of it to start."""
ALL: tuple[Route, ...] = ("endpoint", "local", "node", "modal")
HERE: tuple[Route, ...] = ("local", "node")


@dataclass(frozen=True)
class Finding:
    """One thing that a run may need."""

    what: str
    state: State
    found: str
    """What is there, in a few words; never a secret."""
    mend: str
    """How to get it; empty where nothing is wrong."""
    needed_by: tuple[Route, ...]
    """Ways to a server that do not work without it; for others it is only good to have."""


Check = Callable[[], Finding]


def command(
    *,
    route: Annotated[
        Route | None,
        Parameter(help="What you want to run: endpoint, local, node or modal; without it everything is shown."),
    ] = None,
    json: Json = False,
) -> int:
    """Check what runs need: GPU, environments, sandbox, disk, tokens, Prefect. Nothing is changed, no secret is shown.

    Ends with 1 when something is missing that the route cannot do without.
    """
    found = list(findings())
    lacking = [
        one for one in found if one.state == "missing" and (route in one.needed_by if route else one.needed_by == ALL)
    ]
    if json:
        print_json([asdict(one) for one in found])
    else:
        data.print(table(found, route))
        talk.print(verdict(lacking, route))
    return EXIT_FAILED if lacking else EXIT_DONE


def findings() -> Iterator[Finding]:
    for check in (bubblewrap, uv, disk, gpu, vllm, modal_token, modal_secret, hub_token, s3, prefect):
        yield check()


def table(found: list[Finding], route: Route | None) -> Table:
    shown = Table("", "", "what", "found", "how to mend it", box=None, pad_edge=False)
    for one in found:
        good = one.state == "ok"
        needed = route in one.needed_by if route else bool(one.needed_by)
        mark = Text("✓", "green") if good else Text("✗", "red") if needed else Text("–", "yellow")
        shown.add_row(mark, ", ".join(one.needed_by) if one.needed_by != ALL else "all", one.what, one.found, one.mend)
    return shown


def verdict(lacking: list[Finding], route: Route | None) -> str:
    for_what = f"infra.target={route}" if route else "any run"
    if not lacking:
        return f"Nothing is missing that {for_what} needs."
    return f"Missing for {for_what}: {', '.join(one.what for one in lacking)}"


def bubblewrap() -> Finding:
    what = "sandbox for generated code"
    try:
        Sandbox().check()
    except ModalEvalError as error:
        return Finding(what, "missing", "does not run", " ".join(str(error).split())[:300], ALL)
    return Finding(what, "ok", "bubblewrap works", "", ALL)


def uv() -> Finding:
    what = "uv, which makes the environments"
    try:
        from uv import find_uv_bin

        path = find_uv_bin()
    except (ImportError, FileNotFoundError):
        return Finding(
            what, "missing", "not found", "run `make setup`, or install modal-eval with its dependencies", ALL
        )
    return Finding(what, "ok", Path(path).name, "", ALL)


def disk() -> Finding:
    folder = paths.environments_dir()
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free / GB
    what = f"disk for environments and models ({LEAST_DISK_GB} GB)"
    if free < LEAST_DISK_GB:
        mend = "make room, or point MODAL_EVAL_VENVS and MODAL_EVAL_CACHE_DIR to a larger disk"
        return Finding(what, "missing", f"{free:.0f} GB free", mend, HERE)
    return Finding(what, "ok", f"{free:.0f} GB free", "", HERE)


def gpu() -> Finding:
    what = "NVIDIA GPU and driver"
    try:
        there = gpus.inventory()
    except ModalEvalError as error:
        return Finding(what, "missing", "the driver does not answer", " ".join(str(error).split()), ("node",))
    if not there:
        mend = "run on a GPU machine, rent one with infra.target=modal, or use a GGUF model with infra.engine=llamacpp"
        return Finding(what, "missing", "none", mend, ("node",))
    kinds = sorted({one.name for one in there})
    return Finding(what, "ok", f"{len(there)} × {', '.join(kinds)}", "", ("node",))


def vllm() -> Finding:
    what = "vLLM's environment"
    folder = paths.environments_dir() / "vllm"
    if (folder / ".modal-eval").is_file():
        return Finding(what, "ok", "made", "", ())
    return Finding(what, "missing", "not made yet", "the first run makes it, or infra.environment names one", ())


def modal_token() -> Finding:
    what = "Modal token"
    if modal_calls.configured():
        return Finding(what, "ok", "configured", "", ("modal",))
    return Finding(
        what, "missing", "none", "`modal token new`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET", ("modal",)
    )


def modal_secret() -> Finding:
    """Also whether Modal takes the token at all."""
    names = InfraConfig().secrets
    what = f"Modal secret {', '.join(names)}"
    if not modal_calls.configured():
        return Finding(what, "missing", "cannot be asked for", "first a token", ("modal",))
    try:
        missing = modal_calls.missing_secrets(names, ASK_S)
    except ModalEvalError as error:
        return Finding(what, "missing", "Modal was not asked", " ".join(str(error).split())[:300], ("modal",))
    if missing:
        mend = "`modal secret create huggingface HF_TOKEN=…`, or --infra.secrets=[] for a public model"
        return Finding(what, "missing", "none", mend, ("modal",))
    return Finding(what, "ok", "present", "", ("modal",))


def hub_token() -> Finding:
    from huggingface_hub import get_token

    what = "Hugging Face token"
    if get_token():
        return Finding(what, "ok", "present", "", ())
    return Finding(what, "missing", "none", "for gated models and --push-to-hub: `hf auth login`, or set HF_TOKEN", ())


def s3() -> Finding:
    """Whether there are credentials, and whether S3 takes them; what they may read is seen with the first address."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    what = "S3 access"
    patience = Config(connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1})
    try:
        session = boto3.Session()
        credentials = session.get_credentials()
        if not credentials:
            mend = "for -m s3://…: `aws configure`, a role of the machine, or AWS_PROFILE"
            return Finding(what, "missing", "no credentials", mend, ())
        session.client("s3", config=patience).list_buckets(MaxBuckets=1)
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "unknown"))
        if code not in REFUSED:  # known to S3, and not allowed to list every bucket
            return Finding(what, "ok", f"from {credentials.method}", "", ())
        return Finding(what, "missing", f"S3 refuses the credentials ({code})", "renew them: `aws configure`", ())
    except BotoCoreError as error:
        mend = f"check the network, AWS_ENDPOINT_URL and ~/.aws ({type(error).__name__})"
        return Finding(what, "missing", "S3 was not reached", mend, ())
    return Finding(what, "ok", f"from {credentials.method}", "", ())


REFUSED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AuthFailure"})


def prefect() -> Finding:
    what = "Prefect server"
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return Finding(what, "ok", "embedded", "", ())
    asked = [f"{url.rstrip('/')}/{path}" for path in ("health", "admin/version")]  # its health it tells everybody
    try:
        health, version = (httpx.get(one, headers=prefect_password(), timeout=TIMEOUT_S).status_code for one in asked)
    except httpx.HTTPError:
        health = version = 0
    if {health, version} & {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
        mend = "set PREFECT_API_AUTH_STRING=USER:PASSWORD as the server has it"
        return Finding(what, "missing", "it lets nobody in without its password", mend, ALL)
    if health == httpx.codes.OK:
        return Finding(what, "ok", "answers", "", ALL)
    return Finding(what, "missing", "PREFECT_API_URL does not answer", "start it, or unset PREFECT_API_URL", ALL)


def prefect_password() -> dict[str, str]:
    """The header by which Prefect's own client is let in, where it is told how."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY  # slow to import

    if password := PREFECT_API_AUTH_STRING.value():
        return {"Authorization": f"Basic {b64encode(password.encode()).decode()}"}
    if key := PREFECT_API_KEY.value():
        return {"Authorization": f"Bearer {key}"}
    return {}
