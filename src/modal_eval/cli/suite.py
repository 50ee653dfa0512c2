"""`modal-eval suite`: one model, many benchmarks, one table."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from rich.markdown import Markdown
from rich.table import Table

from modal_eval import paths, serving
from modal_eval.cli.evaluating import configured_prefect, interrupts_once, load_flow, prefect_api, require_prefect
from modal_eval.cli.options import Json, Model, Settings, typed
from modal_eval.cli.output import complain, data, print_json, shown, talk
from modal_eval.compare.baselines import load_baseline
from modal_eval.compare.gate import judge, markdown_gate
from modal_eval.config.request import SuiteRequest, Where
from modal_eval.config.suites import load_suite, resolve_suite, serving_key
from modal_eval.errors import EXIT_DONE, EXIT_FAILED, EXIT_INCOMPLETE, SuiteError
from modal_eval.reports.suite_table import suite_table
from modal_eval.reports.tables import score_text
from modal_eval.stages.suites import Suite, baseline_of

LOOK_S = 0.5

SuiteOption = Annotated[
    str,
    Parameter(
        name=["-s", "--suite"],
        help="A file of benchmark_configs/suites/, such as code, math, chat, full; or a YAML file.",
    ),
]
SuiteDir = Annotated[
    Path | None, Parameter(name="--suite-dir", help="Folder of the suite's result; one that holds a suite is finished.")
]
WhereOption = Annotated[
    Where, Parameter(name="--where", help="On this machine, or by the workers of a Prefect server's pools.")
]
AtOnceOption = Annotated[
    int,
    Parameter(name="--at-once", validator=validators.Number(gte=1), help="Benchmarks that are worked on at a time."),
]


def command(
    *,
    model: Model,
    suite: SuiteOption,
    where: WhereOption = "here",
    at_once: AtOnceOption = 4,
    suite_dir: SuiteDir = None,
    baseline: Annotated[
        str | None,
        Parameter(name="--baseline", help="Compare with this stored baseline; exit 1 when something got worse."),
    ] = None,
    save_baseline: Annotated[
        str | None, Parameter(name="--save-baseline", help="Store the result as a baseline of this name.")
    ] = None,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", help="Print the benchmarks and the servers they share; start nothing.")
    ] = False,
    json: Json = False,
    overrides: Settings = None,
) -> int:
    """Evaluate a model on every benchmark of a suite.

    Benchmarks that need the same server share one, which is started once. One that fails stops no other; the same command
    with `--suite-dir` runs what is missing.
    """
    request = SuiteRequest(model=model, suite=suite, overrides=typed(overrides), where=where, suite_dir=suite_dir)
    if dry_run:
        return show_plan(request, as_json=json)
    if baseline:
        load_baseline(baseline)  # before hours of work, not after
    opened = run_suite(request, at_once)
    rows = opened.outcomes()
    code = exit_code(rows)
    if json:
        print_json({**opened.describe(), "suite_dir": str(opened.suite_dir), "outcomes": rows})
    else:
        show_table(opened)
    if save_baseline:
        talk.print(f"baseline {save_baseline}: {shown(baseline_of(opened.suite_dir, save_baseline))}", soft_wrap=True)
    return max(code, gate(opened, baseline)) if baseline else code


def run_suite(request: SuiteRequest, at_once: int) -> Suite:
    """Run the flow for `request` and say how each benchmark ended. Failures of benchmarks stand in its rows."""
    api_url = require_prefect("--where=pools") if request.where == "pools" else configured_prefect()
    suite = Suite.open(request)
    if request.where == "here" and any(entry.on_modal for entry in suite.entries):
        serving.require_modal()
    talk.print(f"{suite.model} on {len(suite.entries)} benchmarks of {suite.name}", soft_wrap=True)
    talk.print(f"suite folder: {shown(suite.suite_dir)}", soft_wrap=True)
    logs = paths.logs_dir(suite.suite_dir)
    logs.mkdir(exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(interrupts_once())
        stack.enter_context(prefect_api(api_url, suite.suite_dir))
        flow = load_flow("suite", log_path=logs / "flow.log")
        stack.enter_context(said_as_it_ends(suite))
        with suppress(SuiteError):  # the table says which
            flow(
                model=request.model, suite=request.suite, where=request.where, at_once=at_once, suite_dir=suite.suite_dir,
                overrides=request.overrides,
            )  # fmt: skip
    return suite


@contextmanager
def said_as_it_ends(suite: Suite) -> Iterator[None]:
    """Print a line for each benchmark as it ends, as long as the block lasts."""
    told, over = {row["benchmark"] for row in suite.outcomes() if row["status"] == "complete"}, threading.Event()

    def look() -> None:
        for row in suite.outcomes():
            if row["status"] != "owed" and row["benchmark"] not in told:
                told.add(row["benchmark"])
                score = score_text(row.get("avg_reward"), row.get("stderr"))
                talk.print(
                    f"{row['benchmark']}: {'' if row.get('error') else f'{score}, '}{row['status']}", soft_wrap=True
                )

    def watch() -> None:
        while not over.wait(LOOK_S):
            look()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        look()


def show_table(suite: Suite) -> None:
    rows = suite.outcomes()
    data.print(suite_table(suite.describe(), rows))
    data.print(f"\nFiles: {shown(suite.suite_dir)}", soft_wrap=True)
    for row in rows:
        if row["status"] in ("failed", "owed"):
            complain(f"{row['benchmark']}: {row.get('error', 'not run')}")
    if exit_code(rows) == EXIT_FAILED:
        complain(f"the same command with --suite-dir={shown(suite.suite_dir)} runs what is missing")


def exit_code(rows: list[dict[str, Any]]) -> int:
    found = {row["status"] for row in rows}
    return EXIT_FAILED if found & {"failed", "owed"} else EXIT_INCOMPLETE if "incomplete" in found else EXIT_DONE


def gate(suite: Suite, baseline: str) -> int:
    """Print each benchmark against the baseline; 1 when one does not pass."""
    before = load_baseline(baseline)
    verdicts = judge(before, suite.outcomes())
    data.print(Markdown(markdown_gate(before, suite.model, verdicts)))
    return EXIT_DONE if all(one.passes for one in verdicts) else EXIT_FAILED


def show_plan(request: SuiteRequest, *, as_json: bool) -> int:
    configs = resolve_suite(request.model, load_suite(request.suite), request.overrides)
    keys = list(dict.fromkeys(map(serving_key, configs.values())))
    if as_json:
        print_json({name: config.model_dump(mode="json") for name, config in configs.items()})
        return EXIT_DONE
    table = Table("benchmark", "server", "target", "context", "rollouts", "examples", box=None, pad_edge=False)
    for name, config in configs.items():
        table.add_row(
            name, str(keys.index(serving_key(config)) + 1), config.infra.target, str(config.vllm.max_model_len or "model's"),
            str(config.eval.rollouts), str(config.eval.num_examples or "all"),
        )  # fmt: skip
    data.print(table)
    data.print(f"\n{len(configs)} benchmarks on {len(keys)} servers. Nothing was started.", soft_wrap=True)
    return EXIT_DONE
