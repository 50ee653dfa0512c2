import itertools
import math
import random
import statistics

import pytest

from modal_eval.metrics import clustered_standard_error, mean, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_equals_drawing_every_subset(num_samples):
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            draws = list(itertools.combinations(samples, k))
            brute_force = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(brute_force)


def test_pass_at_k_stays_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01)


def test_pass_at_k_refuses_more_draws_than_samples():
    with pytest.raises(ValueError, match="pass@8 cannot be estimated from 4 samples"):
        pass_at_k(4, 2, 8)


def test_pass_at_k_refuses_more_correct_than_samples():
    with pytest.raises(ValueError, match="num_correct=5"):
        pass_at_k(4, 5, 1)


def test_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_one_rollout_an_example_gives_the_ordinary_standard_error():
    values = [random.Random(1).random() for _ in range(40)]
    assert clustered_standard_error([[value] for value in values]) == pytest.approx(
        statistics.stdev(values) / math.sqrt(len(values))
    )


def test_rollouts_that_always_agree_count_as_one():
    answers = [0.0, 1.0, 1.0, 0.0, 1.0]
    once = clustered_standard_error([[answer] for answer in answers])
    assert clustered_standard_error([[answer] * 8 for answer in answers]) == pytest.approx(once)


def test_clustered_standard_error_is_near_the_spread_of_many_repetitions():
    """Brute force: repeat a whole evaluation with clustered answers and look how far its mean scatters."""
    source = random.Random(7)

    def evaluation():
        return [[float(source.random() < skill) for _ in range(4)] for skill in (source.random() for _ in range(60))]

    runs = [evaluation() for _ in range(400)]
    scatter = statistics.stdev(mean([value for cluster in run for value in cluster]) for run in runs)
    claimed = statistics.mean(clustered_standard_error(run) for run in runs)
    assert claimed == pytest.approx(scatter, rel=0.15)


def test_one_example_has_no_standard_error():
    assert clustered_standard_error([[0.0, 1.0, 1.0]]) is None


def test_examples_without_a_scored_rollout_are_left_out():
    assert clustered_standard_error([[0.0], [], [1.0]]) == clustered_standard_error([[0.0], [1.0]])
