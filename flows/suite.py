"""One checkpoint on many benchmarks, side by side."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from modal_eval.config.models import Overrides, Target
from modal_eval.config.request import AtOnce, ModelName, NumExamples, SuiteName, SuiteRequest, Where, with_settings
from modal_eval.stages.suites import Suite, give_back
from tasks.accounts import in_the_name_of
from tasks.naming import run_id_of_flow_run, suite_run_name, tag_flow_run, tags_of
from tasks.suite import cancel_runs, evaluate_all, refuse_failures, report_suite


@flow(
    name="suite",
    flow_run_name=suite_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=64),
    on_cancellation=[cancel_runs],
)
def suite(
    model: ModelName,
    suite: SuiteName,
    target: Target | None = None,
    num_examples: NumExamples | None = None,
    where: Where = "pools",
    at_once: AtOnce = 8,
    suite_dir: Path | None = None,
    queue: str | None = None,
    modal_account: str | None = None,
    overrides: Overrides = Overrides(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Evaluate a model on every benchmark of a suite.

    Benchmarks that need the same server share one. One that fails stops no other; then the suite fails at its end, and
    a retry runs what is missing. Returns the table's rows.

    Args:
        model: Hub id (with @revision if wanted), folder, GGUF file, s3://… address, or an endpoint's name.
        suite: A file in `benchmark_configs/suites/`, or the path of a YAML file.
        target: Where the server runs, `infra.target`. Left out, as the benchmark's YAML says.
        num_examples: Only the first N examples, `eval.num_examples`. Left out, as the benchmark's YAML says.
        where: `pools` gives each benchmark's run to the workers of its deployment, `here` starts them on the machine
            that works on the suite.
        at_once: Benchmarks that are worked on at a time.
        suite_dir: Folder of the suite's result; one that holds a suite is finished. Left out, the flow run's id names it.
        queue: Queue that the benchmarks' runs wait in, such as `high`. Left out, `default`.
        modal_account: Name of a Modal Account block, in place of the workers' own logins.
        overrides: Settings of every benchmark. What is left empty stays as the suite and the YAML say.
    """
    request = SuiteRequest(
        model=model, suite=suite, where=where, suite_dir=suite_dir, suite_id=run_id_of_flow_run(),
        queue=queue, modal_account=modal_account, overrides=with_settings(overrides, target, num_examples),
    )  # fmt: skip
    opened = Suite.open(request)
    tag_flow_run({*tags_of(model), f"suite:{opened.name}"})
    with in_the_name_of(modal_account if where == "here" else None, None):
        try:
            evaluate_all(opened, where, at_once)
        finally:
            give_back(opened)
    result = report_suite(opened)
    refuse_failures(opened)
    return result
