import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modal_eval.proxy.faults import retry_after
from modal_eval.proxy.keys import Occurrences, understand

BODY = {"model": "m", "messages": [{"role": "user", "content": "é"}], "temperature": 0.5, "n": 2}


def digest(body, path="/v1/chat/completions"):
    return understand(path, json.dumps(body).encode()).digest


def test_the_order_of_keys_and_the_spaces_between_do_not_matter():
    shuffled = dict(reversed(BODY.items()))
    assert digest(BODY) == understand("/v1/chat/completions", json.dumps(shuffled, indent=3).encode()).digest


@pytest.mark.parametrize("field", ["user", "metadata", "request_id"])
def test_who_asks_does_not_matter(field):
    assert digest({**BODY, field: "x"}) == digest(BODY)


@pytest.mark.parametrize(
    "change", [{"temperature": 0.6}, {"n": 3}, {"stream": True}, {"seed": 1}, {"messages": []}, {"model": "other"}]
)
def test_whatever_may_change_the_answer_makes_another_request(change):
    assert digest({**BODY, **change}) != digest(BODY)


def test_the_same_body_on_another_route_is_another_request():
    assert digest(BODY, "/v1/completions") != digest(BODY)


def test_numbers_that_only_python_can_read_are_understood():
    assert understand("/v1/x", b'{"seed": 123456789012345678901234567890}').digest
    assert (
        understand("/v1/x", b'{"seed": 123456789012345678901234567890}').digest
        != understand("/v1/x", b'{"seed": 1}').digest
    )


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff"])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(ValueError):
        understand("/v1/x", body)


@given(st.lists(st.integers(0, 12), max_size=60))
def test_the_number_is_always_the_smallest_that_nobody_holds(steps):
    """Against a set: 0 claims, any other step gives a claim back, 12 begins a pass."""
    occurrences, held = Occurrences(), []
    for step in steps:
        if step == 12:
            occurrences.begin_pass()
            for old in held:
                occurrences.give_back(old)  # a claim of an earlier pass frees nothing
            held = []
        elif step and held:
            occurrences.give_back(held.pop(step % len(held)))
        else:
            claim = occurrences.claim("1/0", "d" * 64)
            taken = {each.key.occurrence for each in held}
            assert claim.key.occurrence == min(n for n in range(len(taken) + 1) if n not in taken)
            held.append(claim)


def test_equal_requests_of_two_rollouts_do_not_share_numbers():
    occurrences = Occurrences()
    assert [occurrences.claim(tag, "d" * 64).key.occurrence for tag in ("1/0", "1/1", "1/0")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("", None), (None, None), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(header, seconds):
    assert retry_after(header) == seconds
