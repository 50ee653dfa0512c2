"""The scripted upstream itself: a test that trusts it must be able to."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.upstream import upstream, upstream_process


def ask(server, question="What is 6 times 7?", tag="", **settings):
    body = {"model": "stub", "messages": [{"role": "user", "content": question}], **settings}
    headers = {"X-Modal-Eval-Rollout": tag} if tag else {}
    return httpx.post(f"{server.base_url}/chat/completions", json=body, headers=headers, timeout=20)


def text(response):
    return response.json()["choices"][0]["message"]["content"]


def test_samples_of_one_prompt_differ_and_a_tagged_sample_is_always_the_same(upstream):
    assert text(ask(upstream)) != text(ask(upstream))
    assert text(ask(upstream, tag="0/1")) == text(ask(upstream, tag="0/1")) != text(ask(upstream, tag="0/2"))


def test_a_call_that_is_asked_again_after_its_answer_is_counted_as_repeated(upstream):
    ask(upstream, tag="0/1")
    assert upstream.stats()["repeated_after_finish"] == {}
    ask(upstream, tag="0/1")
    assert list(upstream.stats()["repeated_after_finish"].values()) == [1]


def test_a_client_that_left_did_not_get_its_answer(upstream):
    upstream.script(default={"latency": 0.5})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{upstream.base_url}/completions", json={"prompt": "x"}, timeout=0.1)
    deadline = time.monotonic() + 10
    while upstream.stats()["in_flight"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert upstream.stats()["posts"] == 1
    assert upstream.stats()["finished"] == {}


def test_rules_choose_calls_by_number_tag_and_repetition(upstream):
    upstream.script(
        rules=[
            {"behaviour": {"status": 429, "retry_after": "7"}, "tag": "busy"},
            {"behaviour": {"status": 503}, "asks": 1, "contains": "once"},
            {"behaviour": {"status": 500}, "first": 5},
        ]
    )
    busy = ask(upstream, tag="busy")
    assert (busy.status_code, busy.headers["Retry-After"]) == (429, "7")
    assert [ask(upstream, "once").status_code for _ in range(2)] == [503, 200]
    assert [ask(upstream).status_code for _ in range(2)] == [200, 500]


def test_retry_after_can_be_a_date(upstream):
    upstream.script(default={"status": 429, "retry_after": "date+3"})
    assert ask(upstream).headers["Retry-After"].endswith("GMT")


@pytest.mark.parametrize(("fault", "error"), [("close", httpx.RemoteProtocolError), ("cut", httpx.RemoteProtocolError)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_breaks_the_protocol_and_is_not_finished(upstream, fault, error, stream):
    upstream.script(default={"fault": fault})
    with pytest.raises((error, httpx.ReadError)):
        ask(upstream, stream=stream)
    assert upstream.stats()["finished"] == {}


def test_a_silent_socket_says_nothing(upstream):
    upstream.script(default={"fault": "silent"})
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{upstream.base_url}/completions", json={"prompt": "x"}, timeout=0.3)


def test_html_and_broken_json_come_with_status_200(upstream):
    for fault in ("html", "broken_json"):
        upstream.script(default={"fault": fault})
        answer = ask(upstream)
        assert answer.status_code == 200
        with pytest.raises(ValueError, match="Expecting|Unterminated"):
            answer.json()


def test_an_outage_refuses_connections_and_ends_on_the_same_port(upstream):
    ask(upstream)
    upstream.outage(0.5)
    with pytest.raises(httpx.ConnectError):
        ask(upstream)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert ask(upstream).status_code == 200
            break
        except httpx.ConnectError:
            time.sleep(0.05)
    assert upstream.stats()["posts"] == 2


def test_a_chain_of_sixty_hops_is_one_post(upstream):
    upstream.script(default={"hops": 60, "result_drops": 1, "cut": 0.001})
    answer = ask(upstream, tag="0/0")
    hops = 0
    with httpx.Client() as client:
        while answer.status_code == 303:
            hops += 1
            try:
                answer = client.get(answer.headers["Location"])
            except httpx.TransportError:
                continue
    assert (hops, upstream.stats()["posts"]) == (61, 1)
    assert text(answer)


def test_a_post_to_a_result_url_is_refused_and_an_expired_result_is_gone(upstream):
    upstream.script(default={"hops": 1, "result_status": 410})
    place = ask(upstream).headers["Location"]
    assert httpx.post(place, json={}).status_code == 400
    assert httpx.get(place).status_code == 410


def test_a_stream_ends_with_usage_and_done(upstream):
    body = {"messages": [{"role": "user", "content": "a b"}], "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{upstream.base_url}/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert '"usage"' in lines[-2]
    assert lines[-1] == "data: [DONE]"


def test_completions_answer_each_prompt_n_times_with_logprobs(upstream):
    answer = httpx.post(f"{upstream.base_url}/completions", json={"prompt": ["a", "b"], "n": 2, "logprobs": 1}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["logprobs"]["tokens"]


def test_gsm8k_answers_are_right_for_about_half_of_the_samples():
    with upstream(answer="gsm8k", known={"What is 6 times 7?": "42"}) as server:
        right = sum(text(ask(server, tag=f"0/{index}")).endswith("#### 42") for index in range(60))
    assert 15 < right < 45


def test_a_wrong_key_is_refused_and_a_wrong_script_is_named(upstream):
    with pytest.raises(ValueError, match="latancy"):
        upstream.script(default={"latancy": 1})


def test_the_largest_number_in_flight_is_known(upstream):
    upstream.script(default={"latency": 0.5})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: ask(upstream, tag=f"0/{index}"), range(4)))
    assert upstream.stats()["max_in_flight"] == 4


def test_the_process_serves_the_same_and_is_gone_after_the_block(tmp_path):
    with upstream_process(tmp_path, answer="reverse", api_key="k") as server:
        assert ask(server).status_code == 401
        assert httpx.get(f"{server.url}/health", headers={"Authorization": "Bearer k"}).status_code == 200
    with pytest.raises(httpx.ConnectError):
        ask(server)


def test_a_marked_process_is_found_although_its_parent_has_died(mark):
    script = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], start_new_session=True)"
    starter = subprocess.Popen([sys.executable, "-c", script], env=mark.env, stdin=subprocess.PIPE)
    deadline = time.monotonic() + 20
    while not any("input()" in line and "Popen" not in line for line in mark.processes().values()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    starter.stdin.close()  # the orphan reads its end of file and leaves
    starter.wait(20)
