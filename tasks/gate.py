"""The gate, as Prefect sees it: a suite against a baseline."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from modal_eval.compare.baselines import load_baseline
from modal_eval.compare.gate import HEAD, Verdict, judge, markdown_gate
from modal_eval.errors import SuiteError
from modal_eval.results.files import write_json
from modal_eval.stages.suites import baseline_of, read_suite
from tasks.artifacts import key_of, publish


@task(name="compare", cache_policy=NO_CACHE, persist_result=False)
def compare(baseline: str, suite_dir: Path) -> list[Verdict]:
    """A verdict for each benchmark; the table is an artifact, and `gate.json` in the suite's folder."""
    before, facts, rows = load_baseline(baseline), *read_suite(suite_dir)
    verdicts = judge(before, rows)
    write_json(suite_dir / "gate.json", [one.describe() for one in verdicts])
    table = [dict(zip(HEAD, one.cells(), strict=True)) for one in verdicts]
    publish("table", key_of("gate", baseline), table, f"{facts['model']} against {before['model']}")
    text = markdown_gate(before, facts["model"], verdicts)
    publish("markdown", key_of("gate-report", baseline), text, facts["model"])
    return verdicts


@task(name="save_baseline", cache_policy=NO_CACHE, persist_result=False)
def save(baseline: str, suite_dir: Path) -> str:
    return str(baseline_of(suite_dir, baseline))


def refuse_worse(verdicts: list[Verdict], baseline: str) -> None:
    """Raise `SuiteError` that names each benchmark which does not pass, and why."""
    if stopped := [one for one in verdicts if not one.passes]:
        said = "; ".join(f"{one.benchmark} is {one.verdict}{f' ({one.why})' if one.why else ''}" for one in stopped)
        raise SuiteError(f"the gate of baseline {baseline} stops {len(stopped)} of {len(verdicts)} benchmarks: {said}")
