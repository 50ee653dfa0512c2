import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modal_eval.errors import IdentityError, JournalError, RunLockedError
from modal_eval.proxy import check_identity
from modal_eval.proxy.journal import Journal
from modal_eval.proxy.keys import CallKey
from modal_eval.proxy.lines import Answer, encode_answer, encode_pending

PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
"""Each example flushes to a disk that other tests use, too."""
IDENTITY = {"model": {"id": "m", "revision": None}, "sampling": {"temperature": 0.0, "stop": ["a"]}}


def key_of(number, tag="", occurrence=0):
    return CallKey(tag, f"{number:064x}", occurrence)


def answer_of(body, status=200, content_type="application/json"):
    return Answer(status, content_type, body if isinstance(body, bytes) else json.dumps(body).encode(), (3, 5), 12)


def write(journal, *pairs):
    assert journal.commit([(key, encode_answer(key, answer)) for key, answer in pairs]) == [None] * len(pairs)


def written(path, *pairs):
    journal = Journal(path, IDENTITY)
    write(journal, *pairs)
    journal.close()


bodies = st.one_of(
    st.binary(max_size=300),
    st.text(max_size=300).map(str.encode),
    st.recursive(
        st.none() | st.integers(-(2**53), 2**53) | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ).map(lambda value: json.dumps(value).encode()),
    st.just(b'{"pretty":\n 1}'),
    st.just(b'x","json":{}}'),
)
tags = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'), max_size=128)
answers = st.builds(
    Answer,
    st.sampled_from([200, 400]),
    st.sampled_from(["application/json", "text/event-stream; charset=utf-8"]),
    bodies,
    st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    st.integers(0, 10**7),
)
keys = st.builds(CallKey, tags, st.integers(0, 5).map(lambda n: f"{n:064x}"), st.integers(0, 10**5))


@settings(max_examples=60, **PATIENT)
@given(st.dictionaries(keys, answers, max_size=8))
def test_every_answer_is_found_again_byte_by_byte(tmp_path_factory, calls):
    path = tmp_path_factory.mktemp("j") / "checkpoint.jsonl"
    written(path, *calls.items())
    journal = Journal(path, IDENTITY)
    assert {key: journal.find(key) for key in calls} == calls
    assert len(journal) == len(calls)
    journal.close()
    assert all(isinstance(json.loads(line), dict) for line in path.read_bytes().splitlines())


def test_a_torn_last_line_is_cut_off_wherever_it_tore(tmp_path):
    whole = tmp_path / "whole.jsonl"
    written(whole, (key_of(1), answer_of({"n": 1})), (key_of(2), answer_of({"n": 2})))
    data = whole.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(data)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(data[:end])
        journal = Journal(path, IDENTITY)
        assert journal.find(key_of(1)) == answer_of({"n": 1})
        assert journal.find(key_of(2)) is None
        write(journal, (key_of(2), answer_of({"n": "again"})))
        journal.close()
        assert path.read_bytes().startswith(data[:last])
        reopened = Journal(path, IDENTITY)
        assert reopened.find(key_of(2)) == answer_of({"n": "again"})
        reopened.close()


@settings(max_examples=150, **PATIENT)
@given(st.data())
def test_a_changed_byte_never_makes_a_wrong_answer(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("j") / "checkpoint.jsonl"
    calls = {key_of(n, tag=f"{n}/{k}", occurrence=k): answer_of({"n": n, "k": k}) for n in range(2) for k in range(2)}
    written(path, *calls.items())
    content = bytearray(path.read_bytes())
    first = content.index(b"\n") + 1
    position = data.draw(st.integers(first, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    journal = Journal(path, IDENTITY)
    found = {key: journal.find(key) for key in calls}
    assert all(answer in (None, calls[key]) for key, answer in found.items())
    assert sum(answer is None for answer in found.values()) <= 2
    for key, answer in found.items():
        if answer is None:
            write(journal, (key, calls[key]))
    assert {key: journal.find(key) for key in calls} == calls
    journal.close()


def test_a_damaged_line_is_owed_again_and_the_log_says_where(tmp_path, caplog):
    path = tmp_path / "checkpoint.jsonl"
    written(path, (key_of(1, tag="17/3"), answer_of({"text": "forty-two"})), (key_of(2), answer_of({})))
    path.write_bytes(path.read_bytes().replace(b"forty-two", b"forty-one"))
    journal = Journal(path, IDENTITY)
    assert journal.find(key_of(1, tag="17/3")) is None
    assert journal.find(key_of(2)) == answer_of({})
    assert journal.damaged == 1
    assert "17/3" in caplog.text
    assert "owed again" in caplog.text
    journal.close()


def test_a_result_url_is_known_until_its_answer_is_written(tmp_path):
    path, key = tmp_path / "checkpoint.jsonl", key_of(1, tag="1/0")
    journal = Journal(path, IDENTITY)
    assert journal.commit([(key, encode_pending(key, "http://h/r?x=1"))]) == [None]
    journal.close()
    journal = Journal(path, IDENTITY)
    assert journal.find_pending(key) == "http://h/r?x=1"
    assert journal.find(key) is None
    write(journal, (key, answer_of({})))
    assert journal.find_pending(key) is None
    journal.close()


def test_another_identity_is_refused_with_every_key_that_differs(tmp_path):
    path = tmp_path / "checkpoint.jsonl"
    written(path, (key_of(1), answer_of({})))
    before = path.read_bytes()
    other = {"model": {"id": "m", "revision": "abc"}, "sampling": {"temperature": 0.5, "stop": ["a"]}}
    for refuse in (lambda: check_identity(path, other), lambda: Journal(path, other)):
        with pytest.raises(IdentityError) as refused:
            refuse()
        assert "sampling.temperature: 0.0 in the journal, 0.5 now" in str(refused.value)
        assert 'model.revision: null in the journal, "abc" now' in str(refused.value)
        assert "stop" not in str(refused.value)
        assert "modal-eval run" in str(refused.value)
    assert path.read_bytes() == before


def test_the_same_identity_is_accepted_and_so_is_a_journal_that_is_not_there(tmp_path):
    written(tmp_path / "checkpoint.jsonl")
    check_identity(tmp_path / "checkpoint.jsonl", {**IDENTITY, "sampling": {"temperature": 0.0, "stop": ("a",)}})
    check_identity(tmp_path / "none.jsonl", IDENTITY)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"modal_eval_journal":99,"identity":{}}\n', "format 99"),
        (b'{"task_id": 3, "completion": "x"}\n', "no journal of modal-eval"),
        (b"\x89PNG not a text at all", "no journal of modal-eval"),
    ],
)
def test_a_file_that_is_no_journal_of_this_format_is_refused_and_left_alone(tmp_path, content, said):
    path = tmp_path / "checkpoint.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=said):
        Journal(path, IDENTITY)
    assert path.read_bytes() == content


def test_a_header_that_was_torn_while_it_was_written_is_begun_anew(tmp_path):
    path = tmp_path / "checkpoint.jsonl"
    written(path)
    header = path.read_bytes()
    for end in (0, 1, 30, len(header) - 1):
        path.write_bytes(header[:end])
        Journal(path, IDENTITY).close()
        check_identity(path, IDENTITY)


def test_a_second_writer_is_refused_with_the_holders_host_and_pid(tmp_path):
    path = tmp_path / "checkpoint.jsonl"
    journal = Journal(path, IDENTITY)
    with pytest.raises(RunLockedError) as refused:
        Journal(path, IDENTITY)
    assert str(os.getpid()) in str(refused.value)
    assert socket.gethostname() in str(refused.value)
    journal.close()
    Journal(path, IDENTITY).close()


def test_a_replay_reads_a_journal_that_another_process_writes_and_changes_nothing(tmp_path):
    path = tmp_path / "checkpoint.jsonl"
    journal = Journal(path, IDENTITY)
    write(journal, (key_of(1), answer_of({})))
    with path.open("ab") as file:
        file.write(b'{"crc":"torn')
    before = path.read_bytes()
    replay = Journal(path, IDENTITY, read_only=True)
    assert replay.find(key_of(1)) == answer_of({})
    replay.close()
    assert path.read_bytes() == before
    with path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    journal.close()


def test_memory_does_not_grow_with_the_answers(tmp_path):
    used = {}
    for size in (100, 20_000):
        path = tmp_path / f"{size}.jsonl"
        written(path, *((key_of(n, tag=f"{n}/0"), answer_of({"text": "x" * size})) for n in range(2000)))
        tracemalloc.start()
        journal = Journal(path, IDENTITY)
        used[size] = tracemalloc.get_traced_memory()[0] / 2000
        tracemalloc.stop()
        journal.close()
    assert used[20_000] < 250
    assert abs(used[20_000] - used[100]) < 20


FILL = """
import json, sys
from pathlib import Path
from modal_eval.proxy.journal import Journal
from modal_eval.proxy.keys import CallKey
from modal_eval.proxy.lines import Answer, encode_answer

journal = Journal(Path(sys.argv[1]), {}, reserve_bytes=int(sys.argv[2]))
body = json.dumps({"text": "x" * 20_000}).encode()
told = []
while len(told) < 10_000:
    key = CallKey("", f"{len(told):064x}", 0)
    failure, = journal.commit([(key, encode_answer(key, Answer(200, "application/json", body)))])
    told.append((failure is None, journal.error is None))
    if failure:
        break
found = [journal.find(CallKey("", f"{n:064x}", 0)) is not None for n in range(len(told))]
print(json.dumps({"told": told, "found": found, "error": journal.error, "message": str(failure)}))
"""


NEW_DISK = ["unshare", "--user", "--map-root-user", "--mount"]


def fill(path, reserve, *, limit=None, before=()):
    ran = subprocess.run(
        [*before, sys.executable, "-c", FILL, str(path), str(reserve)],
        capture_output=True,
        text=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
        check=True,
    )
    return json.loads(ran.stdout)


def test_on_a_full_disk_the_reserve_takes_what_is_in_flight_and_nothing_finished_is_lost(tmp_path):
    small_disk = [*NEW_DISK, "sh", "-c", f'mount -t tmpfs -o size=4m tmpfs "{tmp_path}" && exec "$@"', "sh"]
    if subprocess.run([*small_disk, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk in a namespace of its own")
    said = fill(tmp_path / "checkpoint.jsonl", 1 << 20, before=small_disk)
    kept = [ok for ok, _ in said["told"]]
    warned = [healthy for _, healthy in said["told"]].index(False)
    assert said["found"] == kept
    assert sum(kept[warned:]) * 20_000 > 0.9 * (1 << 20)
    assert "No space left" in said["error"]
    assert "No space left" in said["message"]


def test_a_file_size_limit_is_told_and_leaves_every_finished_line_whole(tmp_path):
    path = tmp_path / "checkpoint.jsonl"
    said = fill(path, 0, limit=1_000_000)
    assert said["found"] == [ok for ok, _ in said["told"]]
    assert said["found"].count(True) >= 40
    assert "File too large" in said["error"]
    journal = Journal(path, {})
    assert len(journal) == said["found"].count(True)
    assert journal.damaged == 0
    journal.close()


def test_a_disk_without_room_for_the_reserve_is_refused_before_anything_starts(tmp_path):
    """A limit on the file's size stands for the disk: asking for more than the disk has would fill it for a moment."""
    path = tmp_path / "checkpoint.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(JournalError, match="free some space"):
            Journal(path, IDENTITY, reserve_bytes=2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.with_suffix(".reserve").exists()
    Journal(path, IDENTITY).close()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(Path("/proc/checkpoint.jsonl"), IDENTITY)
