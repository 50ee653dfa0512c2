"""The regression evaluation: a suite, every night, against a stored baseline."""

from typing import Any

from prefect import flow

from flows.suite import suite as suite_flow
from modal_eval.config.models import Overrides, Target
from modal_eval.config.request import AtOnce, BaselineName, ModelName, NumExamples, SuiteName, Where
from tasks.gate import compare, refuse_unopened, refuse_unusable, refuse_worse, save, tell
from tasks.naming import nightly_run_name, suite_folder_of_flow_run


@flow(name="nightly", flow_run_name=nightly_run_name)
def nightly(
    model: ModelName,
    suite: SuiteName,
    baseline: BaselineName,
    save_baseline: bool = False,
    target: Target | None = None,
    num_examples: NumExamples | None = None,
    where: Where = "pools",
    at_once: AtOnce = 8,
    notify: str | None = None,
    queue: str = "nightly",
    modal_account: str | None = None,
    overrides: Overrides = Overrides(),  # noqa: B008 - frozen
) -> list[dict[str, Any]]:
    """Evaluate a suite and compare it with a baseline, example by example.

    Fails when a benchmark got worse, with the 95% interval of the difference below 0, or cannot be compared. Returns a
    verdict for each benchmark.

    Args:
        model: Hub id (with @revision if wanted), folder, GGUF file, s3://… address, or an endpoint's name.
        suite: A file in `benchmark_configs/suites/`, or the path of a YAML file.
        baseline: Name of the stored baseline.
        save_baseline: Store this night's runs as the baseline instead of comparing them.
        target: Where the server runs, `infra.target`. Left out, as the benchmark's YAML says.
        num_examples: Only the first N examples, `eval.num_examples`. Left out, as the benchmark's YAML says.
        where: `pools` gives each benchmark's run to the workers of its deployment, `here` starts them on the machine
            that works on the suite.
        at_once: Benchmarks that are worked on at a time.
        notify: Name of a Notification Target block, whose people are told when a benchmark does not pass, or the suite
            cannot be started.
        queue: Queue that the benchmarks' runs wait in.
        modal_account: Name of a Modal Account block, in place of the workers' own logins.
        overrides: Settings of every benchmark. What is left empty stays as the suite and the YAML say.
    """
    refuse_unusable(baseline, notify, save_baseline=save_baseline)  # before hours of work, not after
    folder = suite_folder_of_flow_run(model, suite)
    state = suite_flow(
        model=model, suite=suite, target=target, num_examples=num_examples, where=where, at_once=at_once, overrides=overrides,
        suite_dir=folder, queue=queue, modal_account=modal_account, return_state=True,
    )  # fmt: skip
    refuse_unopened(folder, state, notify, baseline)
    if save_baseline:
        save(baseline, folder)
        return []
    verdicts = compare(baseline, folder)
    tell(notify, verdicts, baseline)
    refuse_worse(verdicts, baseline)
    return [one.describe() for one in verdicts]
