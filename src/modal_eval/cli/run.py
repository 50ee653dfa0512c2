"""`modal-eval run`: one command, one number."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from modal_eval.cli.evaluating import evaluate
from modal_eval.cli.options import Benchmark, Json, Model, PushToHub, RunDir, Settings, typed
from modal_eval.cli.output import data, print_json
from modal_eval.config.models import Overrides
from modal_eval.config.request import RunRequest
from modal_eval.errors import EXIT_DONE
from modal_eval.stages.opening import plan_run

KEEP_S = 3600


def command(
    *,
    model: Model,
    benchmark: Benchmark,
    run_dir: RunDir = None,
    push_to_hub: PushToHub = None,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", help="Print the configuration and the plan; start nothing.")
    ] = False,
    keep: Annotated[
        bool, Parameter(name="--keep", help="Leave the server to the next run for an hour; infra.keep says how long.")
    ] = False,
    json: Json = False,
    overrides: Settings = None,
) -> int:
    """Evaluate a model on a benchmark.

    Starts the model's server (or uses an endpoint), generates through the journal, scores, and prints the result. If
    anything dies on the way, `modal-eval resume` pays only for what is missing.
    """
    request = RunRequest(
        model=model,
        benchmark=benchmark,
        overrides=kept(typed(overrides), keep),
        run_dir=run_dir,
        push_to_hub=push_to_hub,
    )
    if dry_run:
        return show_plan(request, as_json=json)
    return evaluate(request, as_json=json)


def kept(overrides: Overrides, keep: bool) -> Overrides:
    """`--keep` is `--infra.keep=3600`, unless that says another time."""
    given = overrides.model_dump(exclude_unset=True)
    if keep:
        given.setdefault("infra", {}).setdefault("keep", KEEP_S)
    return Overrides.model_validate(given)


def show_plan(request: RunRequest, *, as_json: bool) -> int:
    run = plan_run(request)
    config = run.config
    if as_json:
        print_json(config.model_dump(mode="json"))
        return EXIT_DONE
    data.print_json(config.model_dump_json())
    examples = config.eval.num_examples or "all"
    server = {
        "endpoint": str(config.infra.base_url),
        "node": f"{config.vllm.data_parallel_size} {config.infra.engine} server(s) on leased GPUs of this machine",
        "modal": f"a {config.infra.engine} server on Modal ({config.infra.gpu})",
        "auto": f"{config.infra.engine} on leased GPUs of this machine, or on Modal ({config.infra.gpu}) if none comes free,",
    }.get(config.infra.target, f"a {config.infra.engine} server on this machine")
    data.print(
        f"Would ask {server} for {config.eval.rollouts} rollout(s) of {examples} examples of {config.env_id}, "
        f"{config.eval.max_concurrent} at a time,\nand leave the results in {run.run_dir}. Nothing was started.",
        soft_wrap=True,
    )
    return EXIT_DONE
