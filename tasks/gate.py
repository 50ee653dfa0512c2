"""The gate, as Prefect sees it: a suite against a baseline."""

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from blocks.baselines import Baseline
from blocks.notifications import NotificationTarget
from modal_eval.compare.baselines import load_baseline
from modal_eval.compare.gate import HEAD, Verdict, judge, markdown_gate
from modal_eval.errors import ConfigError, SuiteError
from modal_eval.results.files import write_json
from modal_eval.stages.suites import baseline_of, read_suite
from tasks.accounts import named
from tasks.artifacts import key_of, publish

logger = logging.getLogger("modal_eval.gate")


@task(name="compare", cache_policy=NO_CACHE, persist_result=False)
def compare(baseline: str, suite_dir: Path) -> list[Verdict]:
    """A verdict for each benchmark; the table is an artifact, and `gate.json` in the suite's folder."""
    before, facts, rows = shared_baseline(baseline), *read_suite(suite_dir)
    verdicts = judge(before, rows)
    write_json(suite_dir / "gate.json", [one.describe() for one in verdicts])
    table = [dict(zip(HEAD, one.cells(), strict=True)) for one in verdicts]
    publish("table", key_of("gate", baseline), table, f"{facts['model']} against {before['model']}")
    text = markdown_gate(before, facts["model"], verdicts)
    publish("markdown", key_of("gate-report", baseline), text, facts["model"])
    return verdicts


@task(name="save_baseline", cache_policy=NO_CACHE, persist_result=False)
def save(baseline: str, suite_dir: Path) -> str:
    path = baseline_of(suite_dir, baseline)
    share_baseline(baseline)
    return str(path)


def share_baseline(name: str) -> None:
    """Put this machine's baseline into a block, where every node finds it."""
    Baseline.of(load_baseline(name)).save(Baseline.block_name(name), overwrite=True)


def shared_baseline(name: str) -> dict[str, Any]:
    """The baseline that was shared last, whichever node made it; else this machine's."""
    try:
        return named(Baseline, Baseline.block_name(name)).document()
    except ConfigError:
        return load_baseline(name)


def refuse_unknown(baseline: str, notify: str | None) -> None:
    """Raise `ConfigError` for a baseline or a Notification Target that is not there; an empty name is none."""
    if baseline:
        shared_baseline(baseline)
    if notify:
        named(NotificationTarget, notify)


def tell(target: str | None, verdicts: list[Verdict], baseline: str) -> None:
    """Tell the people of a Notification Target block what does not pass; nobody is told when everything does."""
    stopped = [one for one in verdicts if not one.passes]
    if not target or not stopped:
        return
    text = "\n".join(f"{one.benchmark} is {one.verdict}{f': {one.why}' if one.why else ''}" for one in stopped)
    subject = f"{len(stopped)} of {len(verdicts)} benchmarks do not pass the gate of {baseline}"
    for name in named(NotificationTarget, target).notify(text, subject):
        logger.warning("%s of notification target %s could not be told", name, target)


def refuse_worse(verdicts: list[Verdict], baseline: str) -> None:
    """Raise `SuiteError` that names each benchmark which does not pass, and why."""
    if stopped := [one for one in verdicts if not one.passes]:
        said = "; ".join(f"{one.benchmark} is {one.verdict}{f' ({one.why})' if one.why else ''}" for one in stopped)
        raise SuiteError(f"the gate of baseline {baseline} stops {len(stopped)} of {len(verdicts)} benchmarks: {said}")
