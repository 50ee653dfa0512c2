import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modal_eval.gpus.rule import PATIENCE_S, Request, assign
from tests.support.gpus_simulation import Job, simulate

GPUS = [f"gpu{index}" for index in range(8)]
ALL = frozenset(GPUS)
IMPATIENT = PATIENCE_S
LONGEST_S = 900.0
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "batch_makespan.py"


def request(number, count, allowed=ALL, waited_s=0.0):
    return Request(number, count, frozenset(allowed), waited_s)


def by_brute_force(waiting, free, leased):
    """For each request in turn whether it has to be served, by trying every choice of GPUs.

    `kept` is what older requests that lost their patience have a claim on. The choice among fitting GPUs is the rule's
    own, so it is checked to be one of those found here, and followed.
    """
    chosen = assign(waiting, free, leased)
    left, kept = set(free), set()
    for one in waiting:
        choices = [
            set(some) for some in itertools.combinations(sorted(left), one.count) if set(some) <= one.allowed - kept
        ]
        if not choices:
            assert one.number not in chosen
            reachable = itertools.combinations(sorted({*free, *leased}), one.count)
            if one.waited_s >= PATIENCE_S and any(set(some) <= one.allowed for some in reachable):
                kept |= one.allowed
        else:
            assert set(chosen[one.number]) in choices
            left -= set(chosen[one.number])
    return chosen


requests = st.builds(
    lambda counts: [
        request(number, min(count, len(allowed)), allowed, waited)
        for number, (count, allowed, waited) in enumerate(counts)
    ],
    st.lists(
        st.tuples(
            st.integers(1, 5),
            st.sets(st.sampled_from(GPUS[:5]), min_size=1),
            st.sampled_from([0.0, IMPATIENT / 2, IMPATIENT]),
        ),
        max_size=6,
    ),
)


@given(requests, st.sets(st.sampled_from(GPUS[:5])), st.sets(st.sampled_from(GPUS[:5])))
@settings(deadline=None, max_examples=300)
def test_the_rule_serves_exactly_whom_brute_force_serves(waiting, free, leased):
    chosen = by_brute_force(waiting, sorted(free), sorted(leased - free))
    given_out = [gpu for gpus in chosen.values() for gpu in gpus]
    assert len(given_out) == len(set(given_out))


def test_a_request_gets_all_of_its_gpus_or_none():
    assert assign([request(1, 3)], GPUS[:2], GPUS[2:]) == {}
    assert assign([request(1, 3)], GPUS[:3], GPUS[3:]) == {1: tuple(GPUS[:3])}


def test_a_small_request_fills_the_gap_beside_a_big_one_that_waits():
    assert assign([request(1, 8), request(2, 1)], GPUS[:2], GPUS[2:]) == {2: ("gpu0",)}


def test_a_request_that_has_waited_long_is_overtaken_no_more():
    assert assign([request(1, 8, waited_s=IMPATIENT), request(2, 1)], GPUS[:2], GPUS[2:]) == {}


def test_only_gpus_that_the_impatient_request_could_use_are_kept_for_it():
    waiting = [request(1, 2, GPUS[:2], IMPATIENT), request(2, 1, GPUS[:1]), request(3, 1, GPUS[4:])]
    assert assign(waiting, ["gpu0", "gpu5"], ["gpu1"]) == {3: ("gpu5",)}


def test_nothing_is_kept_for_a_request_that_waits_for_a_strangers_gpu():
    waiting = [request(1, 8, waited_s=IMPATIENT), request(2, 1)]
    assert assign(waiting, GPUS[:2], GPUS[2:7]) == {2: ("gpu0",)}  # the eighth is neither free nor leased


def test_a_request_with_a_choice_leaves_the_gpu_that_another_one_needs():
    assert assign([request(1, 1), request(2, 1, ["gpu0"])], GPUS[:2], []) == {1: ("gpu1",), 2: ("gpu0",)}


jobs = st.lists(
    st.tuples(
        st.floats(0, 3000, allow_nan=False),
        st.floats(1, LONGEST_S, allow_nan=False),
        st.integers(1, 8),
        st.one_of(st.just(ALL), st.frozensets(st.sampled_from(GPUS), min_size=1)),
    ),
    min_size=1,
    max_size=40,
)


@given(jobs)
@settings(deadline=None, max_examples=150)
def test_no_job_waits_longer_than_the_rule_promises(made):
    """Patience, then one longest lease for itself and each of those in front."""
    there = [
        Job(number, arrives, lasts, min(count, len(allowed)), allowed)
        for number, (arrives, lasts, count, allowed) in enumerate(made)
    ]
    longest = max(job.duration_s for job in there)
    for start in simulate(there, GPUS):
        assert start.waited_s <= PATIENCE_S + (start.in_front + 1) * longest + 1e-6


def stream_of_small_jobs_and_a_big_one():
    """A small job every ten seconds for a day: without an end to overtaking, eight GPUs are never free at once."""
    small = [Job(number, number * 10.0, 60.0, 1, ALL) for number in range(8640)]
    return [*small, Job(9999, 95.0, 60.0, 8, ALL)]


def test_a_big_job_in_an_endless_stream_of_small_ones_is_served_within_the_promise():
    big = next(start for start in simulate(stream_of_small_jobs_and_a_big_one(), GPUS) if start.job.count == 8)
    assert PATIENCE_S <= big.waited_s <= PATIENCE_S + 60.0


def test_without_patience_running_out_the_same_job_starves_until_the_stream_ends():
    endless = functools.partial(assign, patience_s=float("inf"))
    big = next(s for s in simulate(stream_of_small_jobs_and_a_big_one(), GPUS, endless) if s.job.count == 8)
    assert big.waited_s > 86_000


@pytest.mark.parametrize("seed", range(5))
def test_no_gpu_idles_while_a_patient_queue_has_somebody_for_it(seed):
    waiting = [request(number, 1 + (number * 7 + seed) % 4) for number in range(6)]
    chosen = assign(waiting, GPUS, [])
    left = 8 - sum(len(gpus) for gpus in chosen.values())
    assert all(one.count > left for one in waiting if one.number not in chosen)


def test_the_teams_batch_is_done_within_the_time_that_the_benchmark_promises():
    ran = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("kept: ") == 4
