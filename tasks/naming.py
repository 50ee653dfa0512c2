"""How runs are called in the Prefect UI, and which earlier results a task may use."""

from pathlib import Path
from typing import Any

from prefect import runtime
from prefect.context import TaskRunContext

from modal_eval import paths
from modal_eval.results.run_folder import Run
from modal_eval.stages import preparing


def eval_run_name() -> str:
    """`benchmark·model`, whether the run is new or resumed by its folder alone."""
    request = runtime.flow_run.parameters.get("request")
    get = request.get if isinstance(request, dict) else lambda key: getattr(request, key, None)
    benchmark, model, run_dir = get("benchmark"), get("model"), get("run_dir")
    if not (benchmark and model) and run_dir and (Path(run_dir) / paths.RUN_CONFIG).is_file():
        held = Run.load(Path(run_dir)).config
        benchmark, model = benchmark or held.name, model or held.model
    return f"{Path(str(benchmark)).stem}·{model}"


def key_of_identity(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """One result per task, run folder and identity: a changed identity never meets an old result."""
    run = Run.load(parameters["run_dir"])
    return f"{context.task.name}/{run.run_id}/{run.fingerprint()}"


def key_of_inputs(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """Like `key_of_identity`, and moved by anything that preparing would look at."""
    run_dir = parameters["run_dir"]
    return f"{context.task.name}/{run_dir.name}/{preparing.fingerprint(run_dir)}"
