"""How runs are called in the Prefect UI, and which earlier results a task may use."""

import logging
import os
from pathlib import Path
from typing import Any

from prefect import get_client, runtime
from prefect.context import TaskRunContext

from modal_eval.checkpoints.resolve import label, step_and_stage
from modal_eval.config.load import split_revision
from modal_eval.config.request import SuiteRequest
from modal_eval.config.suites import load_suite
from modal_eval.results.run_folder import Run
from modal_eval.stages import preparing
from modal_eval.stages.suites import suite_folder

logger = logging.getLogger(__name__)


def eval_run_name() -> str:
    """`benchmark·model@step`, from the parameters of the flow run."""
    given = runtime.flow_run.parameters
    return f"{Path(str(given.get('benchmark'))).stem}·{label(str(given.get('model')))}"


def suite_run_name() -> str:
    given = runtime.flow_run.parameters
    return f"{Path(str(given.get('suite'))).stem}·{label(str(given.get('model')))}"


def nightly_run_name() -> str:
    given = runtime.flow_run.parameters
    return f"nightly {Path(str(given.get('suite'))).stem}·{label(str(given.get('model')))}"


def run_id_of_flow_run() -> str:
    """How the flow run's folder is called: a retry, wherever it runs, has the folder that the first try had."""
    return run_id_of(runtime.flow_run.id)


def run_id_of(flow_run_id: Any) -> str:
    """Eight random digits of an id: the last ones, because the first are a clock in ids of version 7."""
    return str(flow_run_id).replace("-", "")[-8:]


def suite_folder_of_flow_run(model: str, suite: str) -> Path:
    """The suite's folder that a flow run works in, in its first try and in each retry."""
    request = SuiteRequest(model=model, suite=suite, suite_id=run_id_of_flow_run())
    return suite_folder(request, load_suite(suite).name).absolute()


def tags_of(model: str, benchmark: str | None = None) -> set[str]:
    """By what a run is found: its model, the model's stage where its name says one, and its benchmark."""
    name, _ = split_revision(model)
    stage = step_and_stage(name)[1]
    given = os.environ.get("MODAL_EVAL_TAGS", "").split(",")
    found = {
        *given,
        f"model:{label(name)}",
        f"stage:{stage}" if stage else "",
        f"benchmark:{benchmark}" if benchmark else "",
    }
    return found - {""}


def tag_flow_run(tags: set[str]) -> None:
    """Add tags to the flow run that goes on. A Prefect server that does not answer costs the tags, not the run."""
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(runtime.flow_run.id, tags=sorted({*runtime.flow_run.tags, *tags}))
    except Exception as error:  # noqa: BLE001 - whatever is wrong there, an evaluation does not need it
        logger.warning("the flow run could not be tagged: %s: %s", type(error).__name__, error)


def key_of_identity(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """One result per task, run folder and identity: a changed identity never meets an old result."""
    run = Run.load(parameters["run_dir"])
    return f"{context.task.name}/{run.run_id}/{run.fingerprint()}"


def key_of_inputs(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Like `key_of_identity`, and moved by anything that preparing would look at."""
    run_dir = parameters["run_dir"]
    return f"{context.task.name}/{run_dir.name}/{preparing.fingerprint(run_dir)}"
