"""What a proxy leaves when it dies, and what the next one makes of it, with real processes on both sides."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from modal_eval.errors import ConfigError, IdentityError, JournalError, RunLockedError
from modal_eval.processes import start_ticks
from modal_eval.proxy import Proxy
from tests.support.proxying import (
    IDENTITY,
    ask,
    ask_all,
    in_background,
    proxy_settings,
    running_proxy,
    text_of,
    wait_until,
)
from tests.support.upstream import upstream as an_upstream

NEW_DISK = ["unshare", "--user", "--map-root-user", "--mount"]


def gone(pid):
    return start_ticks(pid) == 0


def test_a_finished_run_is_replayed_byte_by_byte_without_a_server(tmp_path, upstream):
    def answers(proxy):
        kinds = [{}, {"stream": True}, {"n": 3}, {"logprobs": True}]
        return [ask(proxy, "hi", f"1/{k}", **fields).content for k, fields in enumerate(kinds)] + [
            ask(proxy, "hi").content for _ in range(3)
        ]

    with running_proxy(tmp_path, upstream.base_url) as proxy:
        first = answers(proxy)
    before = (tmp_path / "checkpoint.jsonl").read_bytes()
    with running_proxy(tmp_path) as replay:
        assert answers(replay) == first
        assert replay.stats()["replayed"] == 7
        missing = ask(replay, "never asked")
        assert missing.status_code == 503
        assert "not in the journal" in missing.json()["error"]["message"]
    assert upstream.stats()["posts"] == 7
    assert (tmp_path / "checkpoint.jsonl").read_bytes() == before


def test_killed_at_random_moments_the_proxy_pays_again_at_most_for_what_was_in_flight(tmp_path, upstream):
    """Every answer has an id of its own, so one that was paid for twice would not be the same."""
    upstream.script(default={"latency": 0.03})
    chance = random.Random(20261121)
    calls = [(f"question {n // 4}", f"{n // 4}/{n % 4}") for n in range(240)]
    heard = {}
    for attempt in range(6):
        proxy = Proxy.start(proxy_settings(tmp_path, [upstream.base_url], max_in_flight=8))
        killer = threading.Timer(chance.uniform(0.1, 0.4), os.kill, (proxy.pid, signal.SIGKILL))
        if attempt < 5:
            killer.start()
        answers = dict(zip(calls, ask_all(proxy, calls, at_once=8), strict=True))
        if attempt < 5:
            killer.join()  # everything may have been answered before
            wait_until(lambda proxy=proxy: proxy.exit_message() is not None, "the proxy was killed")
        else:
            assert proxy.exit_message() is None
        proxy.stop()
        answered = {call: answer for call, answer in answers.items() if answer}
        assert all(answered[call] == answer for call, answer in heard.items() if call in answered)
        heard |= answered
        with (tmp_path / "checkpoint.jsonl").open("ab") as file:
            file.write(b'{"crc":"0123')  # what a kill within a write leaves
    assert len(heard) == len(calls)
    assert upstream.stats()["posts"] <= len(calls) + 5 * 8
    with running_proxy(tmp_path) as replay:
        assert dict(zip(calls, ask_all(replay, calls), strict=True)) == heard
        assert replay.stats()["damaged"] == 0


def test_an_answer_that_the_harness_has_is_never_paid_for_again(tmp_path, upstream):
    """Stricter than above: the answer is on disk before the harness has it, so a kill right after it loses nothing."""
    calls = [("question", f"{n}/0") for n in range(12)]
    for count in range(1, len(calls) + 1):
        proxy = Proxy.start(proxy_settings(tmp_path, [upstream.base_url]))
        for call in calls[:count]:
            assert text_of(ask(proxy, *call))
        os.kill(proxy.pid, signal.SIGKILL)
        proxy.stop()
    assert upstream.stats()["posts"] == len(calls)


def test_a_call_cut_while_the_server_works_on_it_is_taken_up_at_its_result_url(tmp_path, upstream):
    upstream.script(default={"hops": 8, "cut": 0.3})
    proxy = Proxy.start(proxy_settings(tmp_path, [upstream.base_url]))
    with in_background(lambda: ask_all(proxy, [("hi", "1/0")])):
        wait_until(lambda: upstream.stats()["gets"] >= 2, "the result was asked for")
        os.kill(proxy.pid, signal.SIGKILL)
    proxy.stop()
    with running_proxy(tmp_path, upstream.base_url) as resumed:
        assert text_of(ask(resumed, "hi", "1/0"))
    assert upstream.stats()["posts"] == 1


def test_a_result_url_of_a_server_that_is_no_more_is_given_up_for_a_new_call(tmp_path, upstream):
    with an_upstream(hops=100, cut=0.2) as earlier:
        proxy = Proxy.start(proxy_settings(tmp_path, [earlier.base_url]))
        with in_background(lambda: ask_all(proxy, [("hi", "1/0")])):
            wait_until(lambda: earlier.stats()["gets"] >= 1, "the result was asked for")
            os.kill(proxy.pid, signal.SIGKILL)
        proxy.stop()
    with running_proxy(tmp_path, upstream.base_url, retries=2) as resumed:
        assert text_of(ask(resumed, "hi", "1/0"))
    assert upstream.stats()["posts"] == 1


def test_k_rollouts_with_one_body_keep_their_answers_over_a_restart_in_another_order(tmp_path, upstream):
    calls = [("hi", f"7/{k}") for k in range(6)]
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        first = dict(zip(calls, ask_all(proxy, calls), strict=True))
    with running_proxy(tmp_path, upstream.base_url) as resumed:
        backwards = calls[::-1]
        assert dict(zip(backwards, ask_all(resumed, backwards), strict=True)) == first
    assert upstream.stats()["posts"] == len(set(first.values())) == 6


def test_another_identity_is_refused_before_anything_starts(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url):
        pass
    other = {**IDENTITY, "sampling": {"temperature": 0.5}}
    with pytest.raises(IdentityError, match="sampling.temperature: 1.0 in the journal, 0.5 now"):
        Proxy.start(proxy_settings(tmp_path, [upstream.base_url], identity=other))


def test_a_second_proxy_on_one_journal_is_refused_with_the_firsts_pid(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url) as first:
        with pytest.raises(RunLockedError, match=f"process {first.pid} on "):
            Proxy.start(proxy_settings(tmp_path, [upstream.base_url]))
        assert first.alive()


def test_a_key_that_is_not_there_is_told_by_name(tmp_path, upstream):
    with pytest.raises(ConfigError, match="NO_SUCH_KEY_OF_OURS"):
        Proxy.start(proxy_settings(tmp_path, [upstream.base_url], api_key_env="NO_SUCH_KEY_OF_OURS"))


def test_a_proxy_that_cannot_start_quotes_its_log(tmp_path, upstream):
    with pytest.raises(JournalError, match=r"(?s)the proxy exited with .*Semaphore initial value"):
        Proxy.start(proxy_settings(tmp_path, [upstream.base_url], max_in_flight=-1))


def test_a_stopped_proxy_leaves_the_journal_and_its_log_and_nothing_else(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        ask(proxy, "hi", "17/3")
        assert proxy.alive()
        assert proxy.exit_message() is None
    proxy.stop()
    assert gone(proxy.pid)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.jsonl", "logs"]
    assert "POST /v1/chat/completions 17/3 200 " in (tmp_path / "logs" / "proxy.log").read_text()


def test_the_proxy_dies_with_its_owner(tmp_path, upstream):
    script = """
import sys
from pathlib import Path
from tests.support.proxying import proxy_settings
from modal_eval.proxy import Proxy
proxy = Proxy.start(proxy_settings(Path(sys.argv[1]), [sys.argv[2]]))
print(proxy.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), upstream.base_url],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as owner:  # fmt: skip
        pid = int(owner.stdout.readline())
        assert not gone(pid)
        owner.kill()
    wait_until(lambda: gone(pid), "the proxy is gone")


FULL_DISK = """
import json, sys
from pathlib import Path
from modal_eval.proxy import Proxy
from tests.support.proxying import ask, proxy_settings, wait_until
from tests.support.upstream import upstream
from concurrent.futures import ThreadPoolExecutor

folder, logs = Path(sys.argv[1]), Path(sys.argv[2])
settings = proxy_settings(folder, [], max_in_flight=4, reserve_bytes=1 << 20)
with upstream(answer="x" * 100_000) as server:
    from dataclasses import replace
    settings = replace(settings, upstreams=(server.base_url,), log_path=logs / "proxy.log")
    proxy = Proxy.start(settings)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda n: ask(proxy, "hi", f"{n}/0"), range(60)))
    stats, posts = proxy.stats(), server.stats()["posts"]
    refused = ask(proxy, "hi", "new/0")
    proxy.begin_pass()
    replayed = ask(proxy, "hi", "0/0")
    after = server.stats()["posts"]
    proxy.stop()
    print(json.dumps({
        "codes": [a.status_code for a in answers], "error": stats["journal_error"], "posts": posts, "after": after,
        "refused": [refused.status_code, refused.json()["error"]["type"]], "replayed": replayed.status_code,
        "journaled": stats["journaled"],
    }))
"""


def test_on_a_full_disk_what_is_in_flight_is_kept_and_nothing_new_is_paid_for(tmp_path):
    disk, logs = tmp_path / "disk", tmp_path / "logs"
    disk.mkdir()
    small_disk = [*NEW_DISK, "sh", "-c", f'mount -t tmpfs -o size=4m tmpfs "{disk}" && exec "$@"', "sh"]
    if subprocess.run([*small_disk, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small disk in a namespace of its own")
    ran = subprocess.run(
        [*small_disk, sys.executable, "-c", FULL_DISK, str(disk), str(logs)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    kept = said["codes"].count(200)
    assert set(said["codes"]) == {200, 507}
    assert said["posts"] == said["journaled"] == kept
    assert "No space left" in said["error"]
    assert said["refused"] == [507, "journal_error"]
    assert said["replayed"] == 200
    assert said["after"] == said["posts"]


def test_memory_stays_constant_while_answers_go_through(tmp_path, upstream):
    upstream.script(default={"answer": "x" * 100_000})

    def resident_mb(pid):
        return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024

    with running_proxy(tmp_path, upstream.base_url) as proxy:
        ask_all(proxy, [("hi", f"{n}/0") for n in range(100)])
        before = resident_mb(proxy.pid)
        ask_all(proxy, [("hi", f"{n}/1") for n in range(400)])
        assert resident_mb(proxy.pid) - before < 15  # 40 MB went through
    assert (tmp_path / "checkpoint.jsonl").stat().st_size > 40_000_000


def test_the_journal_is_json_lines_for_everybody(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        answer = ask(proxy, "hi", "17/3").json()
        with httpx.Client(trust_env=False) as client:
            client.get(proxy.base_url + "/models")
    header, line, _ = (json.loads(line) for line in (tmp_path / "checkpoint.jsonl").read_text().splitlines())
    assert header["identity"] == IDENTITY
    assert (line["kind"], line["tag"], line["occ"], line["status"]) == ("answer", "17/3", 0, 200)
    assert line["json"] == answer
    assert line["tokens"] == [answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]]
