"""One evaluation, start to finish. Read this file first: every hop is one line."""

from pathlib import Path
from typing import Any

from prefect import flow

from modal_eval.config.models import Overrides, Target
from modal_eval.config.request import BenchmarkName, ModelName, NumExamples, RepositoryName, RunRequest
from modal_eval.results.run_folder import locked
from modal_eval.stages.opening import open_run
from tasks.accounts import in_the_name_of
from tasks.generation import generate, generation_owed, replay
from tasks.naming import eval_run_name, run_id_of_flow_run, tag_flow_run, tags_of
from tasks.preparation import prepare, preparing_owed
from tasks.publishing import push_to_hub as push
from tasks.reporting import report
from tasks.scoring import score
from tasks.serving import deploy_server, start_proxy, teardown


@flow(name="eval", flow_run_name=eval_run_name)
def eval(  # noqa: A001 - `prefect deploy -n eval/…` matches the function's name
    model: ModelName,
    benchmark: BenchmarkName,
    target: Target | None = None,
    num_examples: NumExamples | None = None,
    push_to_hub: RepositoryName | None = None,
    hub_repository: str | None = None,
    modal_account: str | None = None,
    run_dir: Path | None = None,
    overrides: Overrides = Overrides(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Evaluate a model on a benchmark, or finish an interrupted run.

    Deploys the model, puts the proxy in front, generates, gives the server back, scores, reports and, if asked to,
    pushes the run to the Hugging Face Hub. Returns what `metadata.json` holds.

    Args:
        model: Hub id (with @revision if wanted), folder, GGUF file, s3://… address, or an endpoint's name.
        benchmark: A name from `modal-eval benchmarks`, or the path of a YAML file.
        target: Where the server runs, `infra.target`. Left out, as the benchmark's YAML says.
        num_examples: Only the first N examples, `eval.num_examples`. Left out, as the benchmark's YAML says.
        push_to_hub: Data-set repository `owner/name` that the finished run is pushed to, private if it is new.
        hub_repository: Name of a Hub Repository block, in place of the repository and the worker's own login.
        modal_account: Name of a Modal Account block, in place of the worker's own login.
        run_dir: Folder of the run on the machine that works on it; one that holds a run is resumed. Left out, the flow
            run's id names it, so that a retry goes on where the run was.
        overrides: Any setting that differs from the benchmark's. What is left empty stays as the YAML says.
    """
    request = RunRequest(
        model=model, benchmark=benchmark, overrides=overrides, run_dir=run_dir, run_id=run_id_of_flow_run()
    )
    run_dir = open_run(request.with_settings(target=target, num_examples=num_examples))
    tag_flow_run(tags_of(model, benchmark))
    with locked(run_dir), in_the_name_of(modal_account, hub_repository) as repository:
        prepare.with_options(refresh_cache=preparing_owed(run_dir))(run_dir)
        replay(run_dir)
        owed = generation_owed(run_dir)
        try:
            server = deploy_server(run_dir) if owed else None
            proxy = start_proxy(run_dir, server) if owed else None
            generate.with_options(refresh_cache=owed)(run_dir, proxy)
        finally:
            teardown(run_dir)  # before scoring: a GPU that waits for scores is wasted money
        score(run_dir)
        summary = report(run_dir)
        if repository := push_to_hub or repository:
            push(run_dir, repository, return_state=True)  # a failed push fails nothing else
    return summary
