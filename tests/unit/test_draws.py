"""What `metadata.json` says of several rollouts of an example."""

import itertools
import math
import random
import statistics

import pytest

from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.metrics import mean
from modal_eval.reports.draws import draws, interval, reported_ks
from modal_eval.reports.summary import summarize
from modal_eval.reports.tables import score_lines


def config(rollouts, k=None):
    return resolve("m", BenchmarkConfig(name="toy", env_id="toy"), Overrides(eval={"rollouts": rollouts, "k": k}))


def row(example_id, rollout, reward, **more):
    return {"example_id": example_id, "rollout": rollout, "reward": reward, **more}


def answers(*texts, right="7", example_id=0):
    return [row(example_id, n, float(text == right), extracted=text) for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("rollouts", "k", "ks"), [(8, None, [1, 2, 4, 8]), (6, None, [1, 2, 4, 6]), (8, [5, 2, 5], [2, 5]), (1, None, [1])]
)
def test_the_reported_ks_are_those_asked_for_or_the_powers_of_two(rollouts, k, ks):
    assert reported_ks(config(rollouts, k)) == ks


def test_every_number_is_the_mean_over_examples_of_every_draw():
    source = random.Random(3)
    rows = [
        one for example in range(6) for one in answers(*source.choices(["7", "8", "9", ""], k=4), example_id=example)
    ]
    found = draws(config(4, [2, 3]), rows)
    by_example = [[one["reward"] for one in rows if one["example_id"] == example] for example in range(6)]
    for k in (2, 3):
        subsets = [list(itertools.combinations(rewards, k)) for rewards in by_example]
        assert found["pass_at_k"][f"pass@{k}"] == pytest.approx(
            mean([mean([max(s) for s in each]) for each in subsets])
        )
        assert found["pass_hat_k"][f"pass^{k}"] == pytest.approx(
            mean([mean([min(s) for s in each]) for each in subsets])
        )
    assert set(found["maj_at_k"]) == {"maj@2", "maj@3"}
    assert found["k_examples"] == 6
    single = [mean(rewards) for rewards in by_example]
    error = draws(config(4), rows)["k_stderr"]["pass@1"]
    assert error == pytest.approx(statistics.stdev(single) / math.sqrt(6))
    assert set(found["k_stderr"]) == {"pass@2", "pass@3", "pass^2", "pass^3", "maj@2", "maj@3"}


def test_a_vote_can_be_right_where_most_single_samples_are_wrong():
    found = draws(config(5), answers("7", "7", "8", "9", ""))
    assert found["maj_at_k"]["maj@5"] == 1.0
    assert found["pass_at_k"]["pass@1"] == pytest.approx(0.4)


def test_base_and_plus_tests_have_a_pass_at_k_each_and_other_metrics_have_none():
    rows = [
        row(0, 0, 0.0, base_pass=1.0, plus_pass=0.0, has_answer=1.0),
        row(0, 1, 1.0, base_pass=1.0, plus_pass=1.0, has_answer=1.0),
        row(1, 0, 0.0, base_pass=1.0, plus_pass=0.0, has_answer=1.0),
        row(1, 1, 0.0, base_pass=0.0, plus_pass=0.0, has_answer=1.0),
    ]
    found = draws(config(2), rows)
    assert found["metrics_pass_at_k"] == {
        "base_pass pass@1": 0.75, "base_pass pass@2": 1.0, "plus_pass pass@1": 0.25, "plus_pass pass@2": 0.5,
    }  # fmt: skip
    assert found["k_stderr"]["base_pass pass@1"] == pytest.approx(0.25)


def test_a_benchmark_that_looks_for_no_answer_has_no_vote():
    assert draws(config(2), [row(0, 0, 1.0), row(0, 1, 0.0)])["maj_at_k"] == {}
    mixed = [row(0, 0, 1.0, extracted="7"), row(0, 1, 0.0)]
    assert draws(config(2), mixed)["maj_at_k"] == {}


def test_one_rollout_reports_a_k_only_when_it_is_asked_for():
    rows = answers("7")
    assert draws(config(1), rows)["pass_at_k"] == {}
    assert draws(config(1, [1]), rows)["pass_at_k"] == {"pass@1": 1.0}


def test_a_k_above_the_rollouts_is_refused_again_when_it_is_computed():
    """A configuration that never went through the checks, as one made by `model_copy`."""
    small = config(2)
    unchecked = small.model_copy(update={"eval": small.eval.model_copy(update={"k": [4]})})
    with pytest.raises(ValueError, match="pass@4 cannot be estimated from 2 samples"):
        draws(unchecked, answers("7", "8"))


def test_the_interval_stands_on_the_scored_rollouts_and_on_right_or_wrong_alone():
    rows = [row(example, 0, float(example < 3)) for example in range(12)]
    found = interval(rows)
    assert found["low"] < 0.25 < found["high"]
    assert (found["effective_n"], found["level"]) == (12, 0.95)
    assert interval([row(0, 0, 0.5)]) is None
    assert interval([]) is None


def test_the_table_shows_the_interval_and_every_k_with_its_error_and_the_rollouts_behind_it():
    rows = [*answers("7", "8"), *answers("7", "7", example_id=1), row(2, 0, 1.0, extracted="7")]
    summary = summarize(config(2), rows, total_rollouts=6, facts={})
    lines = {name.strip(): (score, count) for name, score, count in score_lines(summary)}
    assert lines["95% interval"][0].startswith("0.")
    assert lines["pass@1"] == ("0.750 ± 0.250", "4")
    assert lines["pass^2"] == ("0.500 ± 0.500", "4")
    assert lines["maj@2"] == ("0.750 ± 0.250", "4")


def test_a_summary_of_an_older_run_is_still_shown():
    summary = summarize(config(2), [row(0, 0, 1.0), row(0, 1, 0.0)], total_rollouts=2, facts={})
    for key in ("interval", "pass_hat_k", "maj_at_k", "k_stderr", "k_examples"):
        del summary[key]
    assert "pass@2" in {name for name, _, _ in score_lines(summary)}
