"""What the lines of a node's GPUs say of leases and of idle time, beside a clock that is stepped by hand."""

from __future__ import annotations

import os
import random

import pytest

from modal_eval import gpus
from modal_eval.gpus import Folder, history
from modal_eval.gpus.history import Event, leases, note, read, usage
from modal_eval.gpus.rule import Request, assign


def asked(at, lease, count=1, among=(0, 1)):
    return Event(at, "asked", lease, tuple(among), count, f"run {lease}")


def taken(at, lease, *indices):
    return Event(at, "taken", lease, indices, len(indices), f"run {lease}")


def released(at, lease, *indices):
    return Event(at, "released", lease, indices, len(indices))


def test_a_lease_is_told_with_its_wait_and_its_end_and_one_that_was_killed_ends_with_the_next():
    lines = [
        asked(0, "a"), taken(1, "a", 0), asked(2, "b"), asked(2, "c"), taken(5, "b", 1), taken(7, "c", 0),
        released(9, "b", 1),
    ]  # fmt: skip
    told = {one.lease_id: (one.gpus, one.since, one.waited_s, one.until) for one in leases(lines)}
    assert told == {"a": ((0,), 1, 1, 7), "b": ((1,), 5, 3, 9), "c": ((0,), 7, 5, None)}


def test_a_lease_that_is_given_back_in_parts_ends_with_the_last_of_them():
    parts = [taken(0, "a", 0, 1), released(3, "a", 1), released(8, "a", 0)]
    assert [one.until for one in leases(parts)] == [8]
    assert [one.until for one in leases(parts[:-1])] == [None]


def test_only_a_free_gpu_that_somebody_may_have_is_idle_while_wanted():
    lines = [
        asked(0, "pair", 2), taken(2, "pair", 0, 1), asked(4, "one"), released(10, "pair", 0, 1), taken(13, "one", 0),
        asked(13, "both", 2), released(20, "one", 0),
    ]  # fmt: skip
    used = usage(lines, [0, 1], until=25)
    assert used.all_s == 50
    assert used.leased_s == 2 * 8 + 7
    assert used.wanted_idle_s == 2 * 2 + 1 * 3 + 2 * 5
    left = [asked(0, "one"), Event(1, "left", "one", (), 1)]
    assert usage(left, [0, 1], until=100).wanted_idle_s == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_sums_are_those_of_a_clock_that_looks_every_second(seed):
    draw, lines, waiting, held, clock = random.Random(seed), [], {}, {}, 0
    wanted = leased = 0
    for number in range(120):
        what = draw.choice(("asked", "taken", "released", "left", "nothing"))
        lease = f"l{number}"
        if what == "asked":
            waiting[lease] = asked(clock, lease, draw.choice((1, 2, 3)), range(4))
            lines.append(waiting[lease])
        elif what == "left" and waiting:
            gone = draw.choice(sorted(waiting))
            del waiting[gone]
            lines.append(Event(clock, "left", gone, (), 1))
        elif what == "taken":
            free = [gpu for gpu in range(4) if gpu not in held]
            fitting = [one for one in waiting.values() if one.count <= len(free)]
            if fitting:
                one = draw.choice(fitting)
                mine = draw.sample(free, one.count)
                held |= dict.fromkeys(mine, one.lease_id)
                del waiting[one.lease_id]
                lines.append(taken(clock, one.lease_id, *mine))
        elif what == "released" and held:
            gpu = draw.choice(sorted(held))
            lines.append(released(clock, held.pop(gpu), gpu))
        for _ in range(draw.randrange(3)):
            if lines:
                leased += len(held)
                free = [str(gpu) for gpu in range(4) if gpu not in held]
                requests = [
                    Request(i, one.count, frozenset(map(str, one.gpus))) for i, one in enumerate(waiting.values())
                ]
                wanted += sum(len(given) for given in assign(requests, free, [str(gpu) for gpu in held]).values())
            clock += 1
    used = usage(lines, range(4), until=clock)
    assert (used.leased_s, used.wanted_idle_s) == (leased, wanted)


def test_the_lines_stay_whole_and_few_when_many_write_and_much_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(history, "LIMIT", 20_000)
    folder = Folder(tmp_path)
    children = []
    for number in range(4):
        if (pid := os.fork()) == 0:
            for turn in range(200):
                note(folder, "taken", f"{number}-{turn}", (turn,), 1, "run")
            os._exit(0)
        children.append(pid)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    found = read(folder)
    assert (tmp_path / history.LOG).stat().st_size <= 20_000
    assert 50 < len(found) < 800
    assert [f"{number}-199" in {event.lease_id for event in found} for number in range(4)].count(True) >= 1
    with (tmp_path / history.LOG).open("ab") as file:
        file.write(b'{"at": 1.0, "what"')
    assert read(folder) == found


def test_real_leases_leave_their_lines(this_machine):
    with gpus.take(2, run="first"):
        assert gpus.try_take(8, run="second") is None
    told = read(this_machine.leases)
    assert [(event.what, event.count, event.run) for event in told] == [
        ("asked", 2, "first"), ("taken", 2, "first"), ("asked", 8, "second"), ("left", 8, ""), ("released", 2, ""),
    ]  # fmt: skip
    (lease,) = leases(told)
    assert lease.gpus == (0, 1)
    assert lease.until is not None
