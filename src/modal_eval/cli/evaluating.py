"""Run the `eval` flow in this process: a Prefect API to report to, a live view, and exits that leave nothing behind."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.text import Text

from modal_eval import paths, serving
from modal_eval.cli.live import LiveView
from modal_eval.cli.output import complain, data, print_json, shown, talk
from modal_eval.cli.prefect_server import embedded_server
from modal_eval.config.request import RunRequest
from modal_eval.errors import EXIT_DONE, EXIT_INCOMPLETE, ConfigError, ModalEvalError, ServerError
from modal_eval.reports.tables import footnote, result_table
from modal_eval.stages import publishing
from modal_eval.stages.opening import open_run, plan_run
from modal_eval.stages.serving import teardown_all

REFUSED = (401, 403)
"""Statuses of a Prefect server that does not know who asks."""


def evaluate(request: RunRequest, *, as_json: bool) -> int:
    """Run the flow for `request`, show it, print its result and return the exit code."""
    run = plan_run(request)
    if serving.placed(run.config).infra.target == "modal" and not (run.run_dir / paths.RUN_CONFIG).is_file():
        serving.require_modal()  # a run to finish may need no server, and so no account
    api_url = configured_prefect()
    run_dir = open_run(request.model_copy(update={"run_dir": run.run_dir}))
    request = request.model_copy(
        update={
            "run_dir": run_dir,
            "model": request.model or run.config.model,
            "benchmark": request.benchmark or run.config.name,
        }
    )
    talk.print(Text.assemble((run.config.model, "bold"), " on ", (run.config.name, "bold")), soft_wrap=True)
    talk.print(f"run folder: {shown(run_dir)}", soft_wrap=True)
    with ExitStack() as stack:
        stack.callback(report_left, run_dir)
        stack.callback(teardown_all)
        stack.enter_context(interrupts_once())
        stack.enter_context(prefect_api(api_url, run_dir))
        flow = load_flow("eval", log_path=paths.logs_dir(run_dir) / "flow.log")
        with LiveView(run_dir):
            summary = call(flow, request)
    if as_json:
        print_json({**summary, "run_dir": str(run_dir)})
    else:
        data.print(result_table(summary))
        data.print("\n" + footnote(summary), soft_wrap=True)
        data.print(f"Files: {shown(run_dir)}", soft_wrap=True)
    for warning in summary["warnings"]:
        complain(warning)
    report_push(request, run_dir)
    return EXIT_DONE if summary["status"] == "complete" else EXIT_INCOMPLETE


def report_left(run_dir: Path) -> None:
    """Name every server of the run that could not be given back: it may cost money."""
    for lease in serving.leases():
        if lease.run_dir == str(run_dir) and not lease.kept:
            complain(
                f"{lease.app or f'the server {lease.server_pid}'} could not be stopped; `modal-eval stop` tries again, and so "
                "does the next run"
            )


def call(flow: Callable[..., Any], request: RunRequest) -> dict[str, Any]:
    """Call the flow; every fault comes with the way on, and one without a name of ours is told where it stands."""
    try:
        summary: dict[str, Any] = flow(
            model=request.model, benchmark=request.benchmark, run_dir=request.run_dir, overrides=request.overrides,
            push_to_hub=request.push_to_hub,
        )  # fmt: skip
    except ConfigError:
        raise
    except ModalEvalError as error:
        if "modal-eval resume" in str(error):
            raise
        raise type(error)(
            f"{error}\nWhat is finished is kept: `modal-eval resume {request.run_dir}` goes on"
        ) from error
    except Exception as error:
        log = paths.logs_dir(request.run_dir or Path()) / "flow.log"
        logging.getLogger("modal_eval").exception("the flow failed")
        raise ModalEvalError(
            f"the flow failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}; the whole story is in {log}, "
            "and `modal-eval resume` goes on from here"
        ) from error
    return summary


def report_push(request: RunRequest, run_dir: Path) -> None:
    if not request.push_to_hub:
        return
    if (run_dir / paths.PUBLISHED).is_file():
        talk.print(f"Pushed to {request.push_to_hub}")
        return
    reason = publishing.failure(run_dir) or f"see {paths.logs_dir(run_dir) / 'flow.log'}"
    complain(
        f"not pushed to {request.push_to_hub}: {reason}; `modal-eval resume {run_dir} --push-to-hub={request.push_to_hub}` "
        "tries again"
    )


def load_flow(name: str, *, log_path: Path) -> Callable[..., Any]:
    """Import `flows/{name}.py` from the project root."""
    root = str(paths.project_root())
    if root not in sys.path:
        sys.path.insert(0, root)
    module = importlib.import_module(f"flows.{name}")
    log_to_file(log_path)
    flow: Callable[..., Any] = getattr(module, name)
    return flow


def log_to_file(path: Path) -> None:
    """Prefect's and our log lines go to the run folder; the terminal is for the live view."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s | %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("modal_eval").setLevel(logging.INFO)
    logging.getLogger("prefect._internal").handlers = [handler]  # has a console of its own


def require_prefect(what: str) -> str:
    """URL of the configured Prefect API, for `what` can do nothing with an embedded one. Raises `ServerError`."""
    if api_url := configured_prefect():
        return api_url
    raise ServerError(
        f"{what} needs a Prefect server, and PREFECT_API_URL is not set: `prefect server start` starts one, and "
        "`export PREFECT_API_URL=http://HOST:4200/api` names it"
    )


def configured_prefect() -> str | None:
    """URL of the Prefect API that the environment or Prefect's profile names.

    Raises `ServerError` when it does not answer or lets us do nothing: then no run folder is made that nobody would finish.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")  # the automation for dead runs waits for four
    os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "9")  # a run that ends waits 17 minutes for an absent server
    from prefect.client.orchestration import get_client  # slow to import, and no other command needs it
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

    api_url: str | None = PREFECT_API_URL.value()
    if not api_url:
        return None
    with get_client(sync_client=True) as client:
        fault = client.api_healthcheck()
        if fault is None:
            try:
                client.api_version()  # its health it tells everybody, whoever they say they are
            except PrefectHTTPStatusError as error:
                fault = error if error.response.status_code in REFUSED else None
    if isinstance(fault, PrefectHTTPStatusError) and fault.response.status_code in REFUSED:
        given = "is another than its own" if PREFECT_API_AUTH_STRING.value() else "is not set"
        raise ServerError(
            f"the Prefect server at PREFECT_API_URL={api_url} lets nobody in without a password (HTTP "
            f"{fault.response.status_code}), and PREFECT_API_AUTH_STRING {given}; set PREFECT_API_AUTH_STRING=USER:PASSWORD as the "
            "server has it"
        )
    if fault:
        raise ServerError(
            f"the Prefect server at PREFECT_API_URL={api_url} does not answer ({fault}); start it, or unset PREFECT_API_URL "
            "to use Prefect's embedded one"
        )
    return api_url


@contextmanager
def prefect_api(api_url: str | None, run_dir: Path) -> Iterator[None]:
    """Report to the Prefect server at `api_url`, else to Prefect's own on its embedded database."""
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if api_url:
        yield
        return
    talk.print("starting Prefect on its embedded database …")
    with (
        embedded_server(paths.logs_dir(run_dir) / "prefect.log") as embedded_url,
        temporary_settings({PREFECT_API_URL: embedded_url}),
    ):
        try:
            yield
        finally:
            APILogHandler().flush()  # what is left goes to the server while it is there


@contextmanager
def interrupts_once() -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or hang-up unwinds and tears down; a second one cannot cut that short."""
    asked = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            complain("already stopping; the servers are being ended")
            return
        asked = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
