"""Hundreds of calls in one sandbox: what comes out, what is flagged, and what the hostile ones cannot do to the others."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modal_eval.scoring import values
from modal_eval.scoring.battery import Group, GroupOutcome, run_battery
from modal_eval.scoring.sandbox import Limits, Sandbox
from tests.support.attacks import ATTACKS, as_function

needs_bwrap = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap"
)
LIMITS = Limits(memory_bytes=2 << 30, max_processes=16, output_bytes=16 << 20)
CLEAN = "def clean(x):\n    return [x * x, (x, {x})]\n"
EXPECTED = tuple(values.encode([x * x, (x, {x})]) for x in range(50))


def group(count: int = 3, seconds: float = 1.0) -> Group:
    return Group([values.encode([x]) for x in range(count)], [seconds] * count, seconds * count, 60)


def call(source: str, entry_point: str = "f", *groups: Group) -> list[GroupOutcome]:
    return run_battery(Sandbox(), source, entry_point, groups or [group()], LIMITS)


@needs_bwrap
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_no_answer_right_and_a_clean_sample_beside_it_is_unharmed(name):
    attack = ATTACKS[name]
    with ThreadPoolExecutor(2) as pool:
        hostile = pool.submit(call, as_function(attack, "f"), "f", group(), group())
        clean = pool.submit(call, CLEAN, "clean", group(50))
        outcomes, (unharmed,) = hostile.result(), clean.result()
    for outcome in outcomes:
        assert all(got != wanted for got, wanted in zip(outcome.values, EXPECTED, strict=False))
    flags = [reason for outcome in outcomes for reason in outcome.tampered]
    assert any(attack.flagged in reason for reason in flags) if attack.flagged else flags == []
    assert (unharmed.status, unharmed.values, unharmed.tampered) == ("ok", EXPECTED, ())


HONEST = {
    "named tuples, data classes and counters": (
        "from collections import Counter, namedtuple\nfrom dataclasses import dataclass\nimport enum, typing, functools\n"
        "Point = namedtuple('Point', 'x y')\n@dataclass(order=True)\nclass Item:\n    x: int\nclass Kind(enum.IntEnum):\n    A = 1\n"
        "def f(x):\n    assert Item(x) == Item(x)\n    return [Point(x, Kind.A), Counter('aab')]"
    ),
    "regular expressions, heaps and itertools": (
        "import re, heapq, itertools, math, bisect, string, random, datetime, decimal, fractions, statistics, copy, operator\n"
        "def f(x):\n    return [re.sub('a', 'b', 'a' * x), heapq.nlargest(2, range(x)), list(itertools.permutations(range(x)))]"
    ),
    "caches and recursion": (
        "import sys\nfrom functools import lru_cache\nsys.setrecursionlimit(10_000)\n@lru_cache(None)\n"
        "def g(n):\n    return n if n < 2 else g(n - 1) + g(n - 2)\ndef f(x):\n    return g(400 + x)"
    ),
    "an exception that it handles": (
        "import traceback, warnings\ndef f(x):\n    try:\n        return 1 / 0\n    except ZeroDivisionError:\n"
        "        traceback.format_exc()\n        warnings.warn('so be it')\n        return None"
    ),
    "a name of its own for a builtin": "def len(x):\n    return 3\nmax = 4\ndef f(list):\n    return len(list) + max",
}


@needs_bwrap
@pytest.mark.parametrize("name", HONEST)
def test_honest_code_is_not_called_tampered(name):
    (outcome,) = call(HONEST[name])
    assert (outcome.status, outcome.failed, outcome.tampered, len(outcome.values)) == ("ok", None, (), 3)


@needs_bwrap
def test_a_call_that_raises_ends_its_group_and_keeps_what_came_before():
    (outcome, second) = call("def f(x):\n    return 6 // (2 - x)", "f", group(5), group(2))
    assert (outcome.values, outcome.failed, outcome.status) == (("3", "6"), "ZeroDivisionError", "ok")
    assert second.values == ("3", "6")


@needs_bwrap
def test_code_that_cannot_be_loaded_has_no_values_and_says_so():
    assert [(one.loaded, one.failed, one.values) for one in call("def f(x:\n")] == [(False, "SyntaxError", ())]
    assert [(one.loaded, one.failed) for one in call("def g(x):\n    return x")] == [(False, "KeyError")]


@needs_bwrap
def test_groups_do_not_see_what_the_others_changed():
    source = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)"
    assert [one.values for one in call(source, "f", group(2), group(3))] == [("1", "2"), ("1", "2", "3")]


@needs_bwrap
def test_a_large_value_comes_out_as_a_digest_or_whole():
    source = "def f(x):\n    return [x] * 200_000"
    (digest,) = call(source, "f", group(2))
    assert all(values.is_digest(text) and len(text) < 200 for text in digest.values)
    assert len(set(digest.values)) == 2
    whole = Group([values.encode([7])], [5.0], 5.0, 60, whole=True)
    (outcome,) = call(source, "f", whole)
    assert values.decode(outcome.values[0]) == [7] * 200_000


@needs_bwrap
def test_one_call_has_its_own_cpu_limit_and_all_have_one_together():
    spin = "import time\ndef f(x):\n    end = time.process_time() + {}\n    while time.process_time() < end: pass\n    return x"
    (slow,) = call(spin.format("(5 if x == 2 else 0)"), "f", group(4, seconds=0.3))
    assert (slow.status, slow.values) == ("timeout", ("0", "1"))
    many = Group(group(40).inputs, [1.0] * 40, 0.5, 60)
    (outcome,) = call(spin.format("0.1"), "f", many)
    assert outcome.status == "overtime"
    assert 2 <= len(outcome.values) <= 8


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers() | st.text())
        | st.frozensets(st.tuples(st.integers(), st.text()))
    ),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
@settings(max_examples=300, deadline=None)
def test_a_value_comes_back_with_its_types(value):
    again = values.decode(values.encode(value))
    assert again == value
    assert repr(again) == repr(value) or isinstance(value, (set, frozenset, dict, list, tuple))
    assert values.encode(again) == values.encode(value)


@given(PLAIN, PLAIN)
@settings(max_examples=300, deadline=None)
def test_equal_text_means_equal_values(one, other):
    assert (values.encode(one) == values.encode(other)) <= (one == other)


def test_a_huge_integer_survives_although_python_would_not_print_it():
    huge = -(7**20_000)
    assert values.decode(values.encode([huge])) == [huge]


def test_text_that_encode_never_wrote_is_refused():
    for text in ('{"x": 1}', '{"t": [1], "s": [2]}', "nonsense"):
        with pytest.raises(ValueError):
            values.decode(text)


@pytest.mark.parametrize(
    "text",
    ['{"fr": ["0x1", "0x0"]}', '{"de": "many"}', '{"i": 5}', '{"c": "ab"}', '{"t": 5}', '{"fr": [1]}', '{"o": []}'],
)  # fmt: skip
def test_a_value_that_cannot_be_made_is_refused_like_any_other_nonsense(text):
    with pytest.raises(ValueError):
        values.decode(text)
    assert not values.is_value(text)


FORGED_ROWS = {
    "an end without its times": {"status": "x"},
    "an end of another status": {"status": "fine", "cpu_s": 0.0, "wall_s": 0.0},
    "an end beside the driver's own": {"status": "ok", "cpu_s": 0.0, "wall_s": 0.0},
    "a value that is no text": {"value": 4},
    "times that are no numbers": {"spent": ["a", {}]},
}


@needs_bwrap
@pytest.mark.parametrize("name", FORGED_ROWS)
def test_a_row_that_the_driver_never_writes_is_a_forgery_and_no_fault_of_ours(name):
    line = json.dumps({"group": 0, **FORGED_ROWS[name]}) + "\n"
    source = (
        "import os\ndef f(x):\n    for fd in range(3, 16):\n        try:\n"
        f"            with open(f'/proc/{{os.getppid()}}/fd/{{fd}}', 'w') as file:\n                file.write({line!r})\n"
        "        except OSError:\n            pass\n    return [x * x, (x, {x})]\n"
    )
    with ThreadPoolExecutor(2) as pool:
        hostile, clean = pool.submit(call, source), pool.submit(call, CLEAN, "clean", group(50))
        (outcome,), (unharmed,) = hostile.result(), clean.result()
    assert outcome.status == "forged" or outcome.tampered
    assert (unharmed.status, unharmed.values, unharmed.tampered) == ("ok", EXPECTED, ())
