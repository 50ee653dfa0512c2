"""`modal-eval batch`: many checkpoints, one suite, one table."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators
from rich.markdown import Markdown

from modal_eval.cli.evaluating import configured_prefect, interrupts_once, prefect_api, require_prefect
from modal_eval.cli.options import Json, Settings, typed
from modal_eval.cli.output import complain, data, print_json, shown, talk
from modal_eval.cli.suite import AtOnceOption, SuiteOption, WhereOption, exit_code
from modal_eval.config.jobs import load_jobs
from modal_eval.errors import EXIT_DONE, EXIT_FAILED
from modal_eval.stages.batches import Batch, batch_folder, cell


def command(
    jobs: Annotated[
        Path,
        Parameter(help='JSON file: a list of {"checkpoint_path": "…", "output_name": "…"}, one for each checkpoint.'),
    ],
    *,
    suite: SuiteOption = "base",
    where: WhereOption = "here",
    jobs_at_once: Annotated[
        int,
        Parameter(
            name="--jobs-at-once", validator=validators.Number(gte=1), help="Checkpoints that are worked on at a time."
        ),
    ] = 4,
    at_once: AtOnceOption = 4,
    batch_dir: Annotated[
        Path | None, Parameter(name="--batch-dir", help="Folder of the batch; one that holds a batch is finished.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", help="Check the file and every setting; start nothing.")
    ] = False,
    json: Json = False,
    overrides: Settings = None,
) -> int:
    """Evaluate many checkpoints on the benchmarks of a suite, and put all of them in one table.

    What fails stops nothing else; the same command with `--batch-dir` runs what is missing.
    """
    batch = Batch((batch_dir or batch_folder()).absolute(), suite, tuple(load_jobs(jobs)), typed(overrides), where)
    if dry_run:
        batch.check()
        data.print(
            f"Would evaluate {len(batch.jobs)} checkpoints on the suite {suite}. Nothing was started.", soft_wrap=True
        )
        return EXIT_DONE
    api_url = require_prefect("--where=pools") if where == "pools" else configured_prefect()
    batch.open()
    talk.print(f"{len(batch.jobs)} checkpoints on {suite}\nbatch folder: {shown(batch.batch_dir)}", soft_wrap=True)
    with ExitStack() as stack:
        stack.enter_context(interrupts_once())
        stack.enter_context(prefect_api(api_url, batch.batch_dir))
        from prefect.settings import PREFECT_API_URL

        work = batch.work_off(jobs_at_once, at_once, {"PREFECT_API_URL": str(PREFECT_API_URL.value())})
        for job in stack.enter_context(closing(work)):
            ended = ", ".join(f"{row['benchmark']} {cell(row)}" for row in batch.rows(job))
            talk.print(f"{job.output_name}: {ended}", soft_wrap=True)
            if fault := batch.faults.get(job.slug):
                complain(f"{job.output_name}: {fault}")
    rows = {job.output_name: batch.rows(job) for job in batch.jobs}
    if json:
        print_json({"batch_dir": str(batch.batch_dir), "suite": suite, "outcomes": rows})
    else:
        data.print(Markdown(batch.markdown()))
        data.print(f"Files: {shown(batch.batch_dir)}", soft_wrap=True)
    return EXIT_FAILED if batch.faults else exit_code([row for found in rows.values() for row in found])
