"""One benchmark of a suite, as Prefect sees it: a task of the suite's, and a flow run of its own wherever it is worked on."""

import hashlib
import logging
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client, task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, State, WorkPoolStatus
from prefect.context import TaskRunContext
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture, as_completed
from prefect.settings import PREFECT_API_URL
from prefect.states import AwaitingRetry, Cancelling

from modal_eval.config.request import Where
from modal_eval.errors import ModalEvalError, ServerError, SuiteError
from modal_eval.reports.suite_table import HEAD, cells, markdown_table
from modal_eval.stages import suites
from modal_eval.stages.suites import Entry, Outcome, Suite
from tasks.artifacts import key_of, outcome_of_flow_run, publish
from tasks.naming import run_id_of, tags_of

logger = logging.getLogger(__name__)

ON_MODAL = "eval/on-modal"
POLL_S = 2.0
_stopping = threading.Event()
"""The suite that this process works on is being given up."""
ABSENCE_S = 1800.0
"""For so long the Prefect server may be away while a suite waits for its runs."""


def key_of_entry(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """One result per suite, benchmark and settings."""
    entry: Entry = parameters["entry"]
    settings = hashlib.sha256(entry.overrides.model_dump_json().encode()).hexdigest()[:12]
    return f"{context.task.name}/{parameters['suite'].suite_id}/{entry.name}/{settings}"


@task(
    name="evaluate",
    task_run_name="{entry.name}",
    retries=0,
    cache_policy=CacheKeyFnPolicy(cache_key_fn=key_of_entry),
    persist_result=True,
    result_serializer="json",
)
def evaluate(suite: Suite, entry: Entry, where: Where) -> Outcome:
    """Run one benchmark to its end and return its row of the table; raises what it failed with."""
    tags = sorted(
        {f"suite:{suite.name}", f"suite-run:{suite.suite_id}", *([f"stage:{suite.stage}"] if suite.stage else [])}
    )
    if where == "here":
        return suites.evaluate_here(suite, entry, tags, {"PREFECT_API_URL": str(PREFECT_API_URL.value())}, _stopping)
    return _evaluate_in_pool(suite, entry, tags)


def _evaluate_in_pool(suite: Suite, entry: Entry, tags: list[str]) -> Outcome:
    """A flow run of the benchmark's deployment, found again by a suite that is tried again.

    One that has failed since is scheduled again: it is the same flow run, so it goes on in its own folder.
    """
    with get_client(sync_client=True) as client:
        overflows = entry.overflow_s is not None
        moved = overflows and (_is_moved(client, suite, entry) or not _has_workers(client, entry))
        made = _start(client, suite, entry, tags, moved=moved)
        state = _wait_for_end(client, made.id, start_within_s=None if moved else entry.overflow_s)
        if state is None:
            made = _start(client, suite, entry, tags, moved=True)
            state = _wait_for_end(client, made.id)
        refuse_unfinished(made, entry, state)
        outcome = outcome_of_flow_run(client, made.id)
        if outcome is None:  # Prefect did not take it; all that went before the report is cached
            client.set_flow_run_state(made.id, AwaitingRetry(), force=True)
            refuse_unfinished(made, entry, _wait_for_end(client, made.id))
            outcome = outcome_of_flow_run(client, made.id)
    if outcome is None:
        raise SuiteError(
            f"the flow run {made.name} of {entry.name} is completed, and has published no result, nor when it was tried again; its "
            "log says why its artifact is not in Prefect"
        )
    return {**outcome, "benchmark": entry.name, "flow_run_id": str(made.id)}


def refuse_unfinished(made: FlowRun, entry: Entry, state: State | None) -> None:
    """Raise `SuiteError` that says how a benchmark's flow run has ended, unless it is completed."""
    if state is None or not state.is_completed():
        ended = f"{state.name}: {state.message or 'its log says why'}" if state else "Cancelled"
        raise SuiteError(f"the flow run {made.name} of {entry.name} ended as {ended}")


def _start(client: SyncPrefectClient, suite: Suite, entry: Entry, tags: list[str], *, moved: bool) -> FlowRun:
    """The flow run of a benchmark, which is scheduled again if it has failed; `moved` from the nodes to Modal."""
    infra = entry.overrides.model_dump().get("infra", {})
    # the deployment's own target is for a server; an address alone means the one that is there
    target = "modal" if moved else infra.get("target") or ("endpoint" if infra.get("base_url") else None)
    name = ON_MODAL if target == "modal" else f"eval/{entry.name}"
    parameters = {
        "model": suite.model,
        "benchmark": entry.benchmark,
        "overrides": entry.overrides.model_dump(mode="json"),
        **({"target": target} if target else {}),
        **({"modal_account": suite.modal_account} if suite.modal_account else {}),
    }
    try:
        made = run_deployment(
            name, parameters=parameters, timeout=0, tags=[*tags, *tags_of(suite.model, entry.name)],
            idempotency_key=_key(suite, entry, moved=moved), work_queue_name=suite.queue,
        )  # fmt: skip
    except ObjectNotFound as error:
        raise ServerError(
            f"the Prefect server has no deployment {name}; `prefect --no-prompt deploy --all` makes one for each benchmark of the "
            "checkout, and `--where=here` needs none"
        ) from error
    if made.state and made.state.is_final() and not made.state.is_completed():
        client.set_flow_run_state(made.id, AwaitingRetry(), force=True)
    return made


def _key(suite: Suite, entry: Entry, *, moved: bool) -> str:
    return f"{suite.suite_id}/{entry.name}" + ("/modal" if moved else "")


def _is_moved(client: SyncPrefectClient, suite: Suite, entry: Entry) -> bool:
    """Whether the suite has sent this benchmark to Modal before."""
    key = FlowRunFilterIdempotencyKey(any_=[_key(suite, entry, moved=True)])
    return bool(client.read_flow_runs(flow_run_filter=FlowRunFilter(idempotency_key=key), limit=1))


def _has_workers(client: SyncPrefectClient, entry: Entry) -> bool:
    """Whether anybody would take the benchmark's run from its pool today."""
    try:
        pool = client.read_deployment_by_name(f"eval/{entry.name}").work_pool_name
        return pool is not None and client.read_work_pool(pool).status == WorkPoolStatus.READY
    except ObjectNotFound:
        return True  # starting it says what is missing


def _wait_for_end(client: SyncPrefectClient, flow_run_id: UUID, *, start_within_s: float | None = None) -> State | None:
    """The state in which a flow run has ended. A Prefect server that is away for a while ends no suite.

    `None` when no worker has ever taken it after `start_within_s`; then it is cancelled. Were it taken just then, its worker
    would end it. One that somebody else has cancelled has ended like any other.
    """
    answered = begun = time.monotonic()
    given_up = False
    while True:
        try:
            run = client.read_flow_run(flow_run_id)
            answered = time.monotonic()
            if run.state and run.state.is_final():
                return None if given_up and run.state.is_cancelled() else run.state
            late = start_within_s is not None and answered - begun >= start_within_s
            if late and run.state and run.state.is_scheduled() and not run.run_count:
                client.set_flow_run_state(flow_run_id, Cancelling(message=f"no worker took it in {start_within_s:g} s"))
                given_up = True
                continue
        except ObjectNotFound:
            raise
        except Exception as error:
            if time.monotonic() - answered > ABSENCE_S:
                raise ServerError(f"the Prefect server has not answered for {ABSENCE_S:g} s: {error}") from error
        if _stopping.wait(POLL_S):
            raise SuiteError("the suite was stopped; its runs go on, and a retry finds them")


def evaluate_all(suite: Suite, where: Where, at_once: int) -> None:
    """Evaluate every benchmark that has no number yet, so many at a time, and write down how each ended.

    None stops another. Those that take this machine as it is wait for each other, unless they share a server.
    """
    held = {row["benchmark"]: row["status"] for row in suite.outcomes()}
    waiting = sorted(suite.entries, key=lambda entry: [one.server for one in suite.entries].index(entry.server))
    _stopping.clear()
    try:
        _work_off(suite, waiting, held, where, at_once)
    except BaseException:
        _stopping.set()  # else the threads that wait for their runs would keep this process
        raise


def _work_off(suite: Suite, waiting: list[Entry], held: dict[str, str], where: Where, at_once: int) -> None:
    running: dict[PrefectFuture[Outcome], Entry] = {}
    while waiting or running:
        for entry in list(waiting):
            if len(running) < at_once and may_start(entry, list(running.values()), where):
                again = held[entry.name] != "complete"
                running[evaluate.with_options(refresh_cache=again).submit(suite, entry, where)] = entry
                waiting.remove(entry)
        future = next(as_completed(list(running)))
        entry = running.pop(future)
        outcome = future.result(raise_on_failure=False)
        suite.note(outcome if isinstance(outcome, dict) else suites.failed(entry.name, said(outcome)))


def may_start(entry: Entry, running: list[Entry], where: Where) -> bool:
    if where == "pools" or not entry.one_at_a_time:
        return True
    return all(one.server == entry.server for one in running if one.one_at_a_time)


def said(error: Any) -> str:
    return str(error) if isinstance(error, ModalEvalError) else f"{type(error).__name__}: {error}"


@task(name="report", cache_policy=NO_CACHE, persist_result=False)
def report_suite(suite: Suite) -> dict[str, Any]:
    """The table over all benchmarks, on disk and in the UI."""
    rows, facts = suite.outcomes(), suite.describe()
    publish(
        "table", key_of("suite", suite.name), [dict(zip(HEAD, cells(row), strict=True)) for row in rows], suite.model
    )
    text = f"{markdown_table(facts, rows)}\nfiles: `{suite.suite_dir}`\n"
    publish("markdown", key_of("suite-report", suite.name), text, suite.model)
    return {**facts, "suite_dir": str(suite.suite_dir), "outcomes": rows}


def refuse_failures(suite: Suite) -> None:
    """Raise `SuiteError` that names the benchmarks without a number."""
    if faults := [row["benchmark"] for row in suite.outcomes() if row["status"] in ("failed", "owed")]:
        raise SuiteError(
            f"{len(faults)} of {len(suite.entries)} benchmarks failed: {', '.join(faults)}; the others have their numbers in "
            f"{suite.suite_dir}, and a retry runs what is missing"
        )


def cancel_runs(_flow: Any, flow_run: Any, _state: Any) -> None:
    """When a suite is cancelled, so are its runs that have not ended."""
    folder = flow_run.parameters.get("suite_dir")
    body = {
        "flow_runs": {
            "tags": {"all_": [f"suite-run:{suites.id_of(Path(folder)) if folder else run_id_of(flow_run.id)}"]}
        }
    }
    with get_client(sync_client=True) as client:
        for one in client.request("POST", "/flow_runs/filter", json=body).json():
            if one["state_type"] not in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                client.set_flow_run_state(UUID(one["id"]), Cancelling())
