import io

import pytest
from rich.console import Console

from modal_eval.cli.live import duration, facts_text, plain_line
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.reports.summary import summarize
from modal_eval.reports.tables import footnote, markdown_report, result_table, score_text


def summary_of(rows, total, model="org/m", **settings):
    config = resolve(model, BenchmarkConfig(name="toy", env_id="toy"), Overrides(eval={"rollouts": 1, **settings}))
    facts = {
        "benchmark": "toy", "run_id": "r1", "harness": {"name": "verifiers"}, "model_revision": "abc",
        "tokens": {"prompt": 10, "completion": 12_345}, "time_ms": 61_000.0,
    }  # fmt: skip
    return summarize(config, rows, total_rollouts=total, facts=facts)


def row(example_id, reward=1.0, **more):
    return {"example_id": example_id, "rollout": 0, "reward": reward, **more}


def printed(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "stderr", "text"), [(None, None, "–"), (0.5, None, "0.500"), (0.5124, 0.0211, "0.512 ± 0.021")]
)
def test_a_score_is_never_shown_with_more_than_is_known(value, stderr, text):
    assert score_text(value, stderr) == text


def test_the_table_shows_the_reward_each_kind_and_each_metric_with_its_count():
    rows = [row(0, task="code", passed=1.0), row(1, reward=0.0, task="code", passed=0.0), row(2, task="format")]
    lines = [line.split() for line in printed(result_table(summary_of(rows, 3))).splitlines()]
    assert ["reward", "0.667", "±", "0.333", "3"] in lines
    assert ["code", "0.500", "±", "0.500", "2"] in lines
    assert ["format", "1.000", "1"] in lines
    assert ["passed", "0.500", "±", "0.500", "2"] in lines


def test_a_run_that_is_incomplete_says_so_on_the_terminal_and_in_the_report():
    summary = summary_of([row(0)], total=2)
    assert "INCOMPLETE" in printed(result_table(summary))
    assert "**Incomplete: this is no score yet.**" in markdown_report(summary)
    assert "* 1 of 2 rollouts are unscored" in markdown_report(summary)


def test_names_with_brackets_are_shown_as_they_are():
    rows = [row(0, task="[/x] one"), row(1, task="[red] two")]
    shown = printed(result_table(summary_of(rows, 2, model="team/[/b]odd")))
    assert all(name in shown for name in ("[/x] one", "[red] two", "team/[/b]odd"))


def test_the_footnote_says_what_the_score_stands_on():
    rows = [row(0, truncated=True), row(1, empty=True), row(2, reward=None, error={"fault": "server"})]
    assert footnote(summary_of(rows, 3)) == (
        "2 of 3 rollouts scored · 1 unscored · 1 truncated · 1 empty · 12,345 tokens generated · 61 s"
    )


def test_the_report_names_run_harness_and_revision():
    report = markdown_report(summary_of([row(0)], 1))
    assert report.startswith("## org/m on toy\n")
    assert "| reward | 1.000 | 1 |" in report
    assert "model revision `abc`" in report


def test_the_live_line_has_score_speed_faults_and_time_left():
    meta = {
        "stage": "generate", "total_rollouts": 40, "completed_rollouts": 12, "avg_reward": 0.5, "stderr": 0.1,
        "unscored_rollouts": 2, "seconds_left": 75.4, "calls": {"tokens_per_s": 81.6, "retries": 3},
    }  # fmt: skip
    assert facts_text(meta) == "score 0.500 ± 0.100 · 82 tok/s · [red]2 unscored[/] · 3 retries · 1:15 left"
    assert plain_line(meta).startswith("generating: 12/40 rollouts · score 0.500 ± 0.100")


def test_a_stage_without_counts_is_told_by_its_name_alone():
    assert plain_line({"stage": "deploy"}) == "starting the model server"
    assert plain_line({"stage": "deploy", "note": "GPU 0: [a run]"}) == "starting the model server: GPU 0: \\[a run]"
    assert plain_line({}) == "starting"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3725, "1:02:05")])
def test_time_left_reads_as_a_clock(seconds, text):
    assert duration(seconds) == text
