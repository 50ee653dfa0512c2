"""The gate, as Prefect sees it: a suite against a baseline."""

import logging
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from blocks.baselines import Baseline
from blocks.notifications import NotificationTarget
from modal_eval import paths
from modal_eval.compare.baselines import baseline_path, load_baseline
from modal_eval.compare.gate import HEAD, Verdict, judge, markdown_gate
from modal_eval.errors import ConfigError, SuiteError
from modal_eval.results.files import write_json
from modal_eval.stages.suites import baseline_of, read_suite
from tasks.accounts import named
from tasks.artifacts import key_of, publish
from tasks.suite import said

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
    """Put this machine's baseline into a block, where every node finds it. Raises `ConfigError` where another one is in it."""
    refuse_taken(name)
    Baseline.of(load_baseline(name)).save(Baseline.block_name(name), overwrite=True)


def shared_baseline(name: str) -> dict[str, Any]:
    """The newer one of what was shared, by whichever node, and of this machine's. Raises `ConfigError` where neither is."""
    block = block_of(name)
    if block is None or block["name"] != name:
        return load_baseline(name)
    if not baseline_path(name).is_file():
        return block
    return max(block, load_baseline(name), key=lambda one: str(one["made_at"]))  # always UTC, so text sorts by time


def block_of(name: str) -> dict[str, Any] | None:
    """What the block holds that a baseline of this name is kept in; it may be a baseline of another name."""
    try:
        return named(Baseline, Baseline.block_name(name)).document()
    except ConfigError:
        return None


def refuse_taken(name: str) -> None:
    """Raise `ConfigError` where the block that this baseline would be kept in holds one of another name."""
    block = block_of(name)
    if block is not None and block["name"] != name:
        raise ConfigError(
            f"baseline '{name}' cannot be shared: its block {Baseline.block_name(name)} holds the baseline '{block['name']}', "
            "since a block's name has small letters, digits and dashes only; take another name, or delete that block on the page "
            "Blocks of Prefect's UI"
        )


def refuse_unusable(baseline: str, notify: str | None, *, save_baseline: bool) -> None:
    """Raise `ConfigError` for a baseline that is not there or cannot be saved, or a Notification Target that is not there."""
    if save_baseline:
        refuse_taken(baseline)
    else:
        shared_baseline(baseline)
    if notify:
        named(NotificationTarget, notify)


def tell(target: str | None, verdicts: list[Verdict], baseline: str) -> None:
    """Tell the people of a Notification Target block what does not pass; nobody is told when everything does."""
    stopped = [one for one in verdicts if not one.passes]
    if not target or not stopped:
        return
    text = "\n".join(f"{one.benchmark} is {one.verdict}{f': {one.why}' if one.why else ''}" for one in stopped)
    tell_people(target, text, f"{len(stopped)} of {len(verdicts)} benchmarks do not pass the gate of {baseline}")


def refuse_unopened(suite_dir: Path, state: State[Any], target: str | None, baseline: str) -> None:
    """Raise what a suite has failed with before it had a folder, once the people of `target` are told: nothing can be compared."""
    if (suite_dir / paths.SUITE).is_file():
        return
    error = state.result(raise_on_failure=False)
    if target:
        tell_people(target, said(error), f"the suite for the gate of {baseline} could not be started")
    state.result()


def tell_people(target: str, text: str, subject: str) -> None:
    """Tell the people of a Notification Target block; who cannot be told is named in the log."""
    for name in named(NotificationTarget, target).notify(text, subject):
        logger.warning("%s of notification target %s could not be told", name, target)


def refuse_worse(verdicts: list[Verdict], baseline: str) -> None:
    """Raise `SuiteError` that names each benchmark which does not pass, and why."""
    if stopped := [one for one in verdicts if not one.passes]:
        found = "; ".join(f"{one.benchmark} is {one.verdict}{f' ({one.why})' if one.why else ''}" for one in stopped)
        raise SuiteError(f"the gate of baseline {baseline} stops {len(stopped)} of {len(verdicts)} benchmarks: {found}")
