"""What goes wrong between the proxy and the server, with real processes on both sides."""

import http.client
import select
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.proxying import ask, ask_all, in_background, redirecting, running_proxy, text_of, wait_until
from tests.support.upstream import upstream


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 503},
        {"status": 429},
        {"status": 408},
        {"fault": "close"},
        {"fault": "html"},
        {"fault": "broken_json"},
        {"fault": "cut"},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_fault_is_tried_again_and_the_harness_never_hears_of_it(tmp_path, upstream, fault, stream):
    upstream.script(rules=[{"behaviour": fault, "asks": 2}])
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        answer = ask(proxy, "hi", "1/0", stream=stream)
        stats = proxy.stats()
    assert answer.status_code == 200
    assert answer.text.rstrip().endswith("[DONE]") if stream else answer.json()["choices"]
    assert upstream.stats()["posts"] == 3
    assert stats["retries"] == 2
    assert sum(stats["faults"].values()) == 2
    assert stats["finished"] == stats["journaled"] == 1


def test_the_proxy_does_not_close_a_connection_that_a_client_may_be_about_to_write_to(tmp_path, upstream):
    """aiohttp keeps a connection for 15 s and httpx for 5; uvicorn's own 5 s made calls fail on a busy machine."""
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        client = http.client.HTTPConnection(urlsplit(proxy.base_url).netloc)
        client.request("GET", "/v1/models")
        assert client.getresponse().read()
        readable, _, _ = select.select([client.sock], [], [], 16)  # what is readable now is its end
        client.close()
    assert readable == []


def test_a_login_of_netrc_for_the_servers_host_gets_into_the_way_of_no_call(tmp_path, upstream, monkeypatch):
    (tmp_path / ".netrc").write_text("default login somebody password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("UPSTREAM_KEY", "sesame")
    monkeypatch.setenv(
        "HTTP_PROXY", upstream.base_url.removesuffix("/v1")
    )  # a host that is not this one needs a way there
    with running_proxy(tmp_path, "http://server.example/v1", api_key_env="UPSTREAM_KEY") as proxy:
        assert text_of(ask(proxy, "hi"))
    assert [entry["authorized"] for entry in upstream.log()] == [True]


def test_a_silent_socket_is_given_up_and_the_call_made_again(tmp_path, upstream):
    upstream.script(rules=[{"behaviour": {"fault": "silent"}, "asks": 1}])
    with running_proxy(tmp_path, upstream.base_url, silence_timeout_s=0.5) as proxy:
        assert text_of(ask(proxy, "hi"))
        assert proxy.stats()["faults"] == {"silent": 1}


def test_a_retry_after_beyond_all_patience_is_told_at_once(tmp_path, upstream):
    upstream.script(default={"status": 429, "retry_after": "86400"})
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        failed = ask(proxy, "hi", timeout=10)
    assert failed.status_code == 503
    assert "away for 86400 s" in failed.json()["error"]["message"]


@pytest.mark.parametrize("retry_after", ["1", "date+2"])
def test_retry_after_is_waited_for(tmp_path, upstream, retry_after):
    upstream.script(rules=[{"behaviour": {"status": 429, "retry_after": retry_after}, "asks": 1}])
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        assert text_of(ask(proxy, "hi"))
    first, second = (entry["at"] for entry in upstream.log())
    assert second - first >= 0.95


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_relayed_at_once_as_a_fault_of_ours_and_not_kept(tmp_path, upstream, status):
    upstream.script(rules=[{"behaviour": {"status": status}, "asks": 1}])
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        refused = ask(proxy, "hi", "1/0")
        assert refused.status_code == status
        assert refused.json()["error"]["message"] == "scripted"
        assert refused.headers["X-Modal-Eval-Fault"] == "upstream"
        assert text_of(ask(proxy, "hi", "1/0"))
        assert proxy.stats()["journaled"] == 1


def test_a_prompt_that_is_too_long_is_an_answer_a_replay_repeats_and_a_resume_asks_again(tmp_path, upstream):
    upstream.script(rules=[{"behaviour": {"status": 400}, "last": 1}])
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        refused = ask(proxy, "hi", "1/0")
        assert refused.status_code == 400
        assert "X-Modal-Eval-Fault" not in refused.headers
    with running_proxy(tmp_path) as replay:
        again = ask(replay, "hi", "1/0")
        assert (again.status_code, again.content) == (400, refused.content)
    with running_proxy(tmp_path, upstream.base_url) as resumed:
        assert text_of(ask(resumed, "hi", "1/0"))
    with running_proxy(tmp_path) as replay:
        assert ask(replay, "hi", "1/0").status_code == 200


def test_after_so_many_tries_the_harness_gets_an_error_in_openais_shape(tmp_path, upstream):
    upstream.script(default={"status": 500})
    with running_proxy(tmp_path, upstream.base_url, retries=2) as proxy:
        failed = ask(proxy, "hi")
        assert failed.status_code == 502
        assert failed.headers["X-Modal-Eval-Fault"] == "upstream"
        assert set(failed.json()["error"]) >= {"message", "type", "code"}
        assert "HTTP 500: " in failed.json()["error"]["message"]
        assert upstream.stats()["posts"] == 3
        assert proxy.stats()["failed"] == 1
        upstream.script(default={"status": 200})
        assert text_of(ask(proxy, "hi"))


def test_a_call_ends_at_its_own_time_limit_whatever_the_server_does(tmp_path, upstream):
    upstream.script(default={"latency": 30})
    with running_proxy(tmp_path, upstream.base_url, call_timeout_s=0.5) as proxy:
        failed = ask(proxy, "hi")
    assert failed.status_code == 504
    assert "no answer within 0.5 s" in failed.json()["error"]["message"]


def test_an_outage_uses_up_no_tries_and_the_answers_come_when_it_is_over(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url, retries=2, retry_cap_s=0.1) as proxy:
        assert text_of(ask(proxy, "before"))
        upstream.outage(3)
        began = time.monotonic()
        answers = ask_all(proxy, [(f"question {n}", f"{n}/0") for n in range(16)])
        assert all(answers)
        assert time.monotonic() - began > 2
        assert proxy.stats()["outage"] is None


def test_a_server_that_stays_away_is_told_by_name_to_harness_and_owner(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url, outage_timeout_s=0.5) as proxy:
        upstream.outage(600)
        failed = ask(proxy, "hi")
        assert failed.status_code == 503
        assert "away" in failed.json()["error"]["message"]
        assert "away" in proxy.stats()["outage"]


def test_sixty_redirects_cost_one_post(tmp_path, upstream):
    upstream.script(default={"hops": 60, "cut": 0.005})
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        assert text_of(ask(proxy, "hi", "1/0"))
        assert proxy.stats()["redirects"] == 59
    assert upstream.stats()["posts"] == 1
    assert upstream.stats()["gets"] == 60


def test_a_result_url_that_drops_connections_is_asked_again_and_never_posted_twice(tmp_path, upstream):
    upstream.script(default={"hops": 2, "result_drops": 10})
    with running_proxy(tmp_path, upstream.base_url, retries=3) as proxy:
        assert text_of(ask(proxy, "hi", "1/0"))
    assert upstream.stats()["posts"] == 1


@pytest.mark.parametrize("status", [404, 410, 500])
def test_a_result_that_is_gone_is_generated_anew(tmp_path, upstream, status):
    upstream.script(rules=[{"behaviour": {"hops": 1, "result_status": status}, "asks": 1}])
    with running_proxy(tmp_path, upstream.base_url, retries=2) as proxy:
        assert text_of(ask(proxy, "hi", "1/0"))
    assert upstream.stats()["posts"] == 2


def test_a_replica_that_is_lost_leaves_its_calls_to_the_others_and_is_taken_back(tmp_path):
    with (
        upstream(latency=0.05) as steady,
        upstream(latency=0.05) as shaky,
        running_proxy(tmp_path, steady.base_url, shaky.base_url) as proxy,
    ):
        calls = [(f"question {n}", f"{n}/0") for n in range(40)]
        assert all(ask_all(proxy, calls[:10]))
        assert steady.stats()["posts"] == shaky.stats()["posts"] == 5
        shaky.outage(2)
        assert all(ask_all(proxy, calls[10:]))
        assert [one["ejected"] for one in proxy.stats()["upstreams"]] == [False, True]
        wait_until(lambda: not any(one["ejected"] for one in proxy.stats()["upstreams"]), "the replica is back")
        before = shaky.stats()["posts"]
        assert all(ask_all(proxy, [(f"more {n}", f"{n}/1") for n in range(10)]))
        assert shaky.stats()["posts"] == before + 5
        assert proxy.stats()["finished"] == 50


def test_a_busy_replica_hands_its_call_to_another_one_without_waiting(tmp_path):
    with (
        upstream(status=503, retry_after="30") as busy,
        upstream() as free,
        running_proxy(tmp_path, busy.base_url, free.base_url) as proxy,
    ):
        began = time.monotonic()
        assert all(ask_all(proxy, [(f"question {n}", f"{n}/0") for n in range(40)]))
        assert time.monotonic() - began < 10
        assert busy.stats()["posts"] < 10


def test_no_more_calls_than_allowed_are_upstream_and_the_others_wait(tmp_path, upstream):
    upstream.script(default={"latency": 0.05})
    with running_proxy(tmp_path, upstream.base_url, max_in_flight=3) as proxy:
        assert all(ask_all(proxy, [(f"question {n}", f"{n}/0") for n in range(24)], at_once=24))
    assert upstream.stats()["max_in_flight"] == 3


def test_a_call_is_timed_without_its_wait_for_a_place_and_a_replay_says_the_same(tmp_path, upstream):
    upstream.script(default={"latency": 0.3})
    with running_proxy(tmp_path, upstream.base_url, max_in_flight=1) as proxy:
        with ThreadPoolExecutor(3) as threads:
            timed = list(
                threads.map(lambda n: ask(proxy, f"question {n}", f"{n}/0").headers["X-Modal-Eval-Ms"], range(3))
            )
        assert all(300 <= int(ms) < 600 for ms in timed), timed
        proxy.begin_pass()
        assert [ask(proxy, f"question {n}", f"{n}/0").headers["X-Modal-Eval-Ms"] for n in range(3)] == timed


def test_a_long_stream_hears_comments_until_its_answer_is_whole(tmp_path, upstream):
    upstream.script(default={"latency": 1.0})
    with running_proxy(tmp_path, upstream.base_url, keep_alive_s=0.2) as proxy:
        heard = ask(proxy, "hi", "1/0", stream=True).text
        assert heard.startswith(": waiting\n\n")
        assert heard.rstrip().endswith("data: [DONE]")
        proxy.begin_pass()
        replayed = ask(proxy, "hi", "1/0", stream=True)
        assert replayed.headers["X-Modal-Eval-Source"] == "journal"
        assert heard.replace(": waiting\n\n", "") == replayed.text


def test_a_long_stream_that_fails_says_so_in_an_event(tmp_path, upstream):
    upstream.script(default={"latency": 0.5, "status": 500})
    with running_proxy(tmp_path, upstream.base_url, keep_alive_s=0.2, retries=0) as proxy:
        heard = ask(proxy, "hi", stream=True).text
    assert 'data: {"error":' in heard
    assert "[DONE]" not in heard


def test_the_key_goes_upstream_and_into_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY_OF_OURS", "sk-very-secret")
    with (
        upstream(api_key="sk-very-secret") as server,
        running_proxy(tmp_path, server.base_url, api_key_env="A_KEY_OF_OURS") as proxy,
    ):
        assert text_of(ask(proxy, "hi"))
        assert "sk-very-secret" not in str(proxy.stats())
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any("sk-very-secret" in text for text in written)
    assert any("A_KEY_OF_OURS" in text for text in written)


def test_the_key_is_not_sent_where_a_redirect_points_elsewhere(tmp_path, monkeypatch):
    """The result URL is on another port, which is another origin."""
    monkeypatch.setenv("A_KEY_OF_OURS", "sk-very-secret")
    with (
        upstream(api_key="sk-very-secret") as elsewhere,
        redirecting(elsewhere.base_url + "/models") as front,
        running_proxy(tmp_path, front, api_key_env="A_KEY_OF_OURS") as proxy,
    ):
        refused = ask(proxy, "hi")
    assert refused.status_code == 401


def test_the_other_routes_go_through(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url) as proxy, httpx.Client(trust_env=False) as client:
        models = client.get(proxy.base_url + "/models")
        assert models.json()["data"][0]["id"] == "stub"
        several = client.post(
            proxy.base_url + "/completions", json={"model": "stub", "prompt": ["a", "b"], "n": 2, "logprobs": 1}
        )
        assert len(several.json()["choices"]) == 4
        assert several.json()["choices"][0]["logprobs"]["tokens"]
        root = proxy.base_url.removesuffix("/v1")
        counted = [
            client.post(url + "/tokenize", json={"model": "stub", "prompt": "a b c"}) for url in (root, proxy.base_url)
        ]
        assert [each.json()["count"] for each in counted] == [3, 3]
        assert client.post(root + "/nothing", json={}).status_code == 404
    with running_proxy(tmp_path) as replay, httpx.Client(trust_env=False) as client:
        assert client.get(replay.base_url + "/models").content == models.content
        again = client.post(
            replay.base_url + "/completions", json={"model": "stub", "prompt": ["a", "b"], "n": 2, "logprobs": 1}
        )
        assert again.content == several.content


def test_a_request_under_another_name_is_refused(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        refused = httpx.get(proxy.base_url + "/models", headers={"Host": "evil.example"}, trust_env=False)
    assert refused.status_code == 403


def test_a_harness_that_hangs_up_leaves_a_call_that_the_next_one_joins(tmp_path, upstream):
    upstream.script(default={"latency": 1.0})
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        with pytest.raises(httpx.ReadTimeout):
            ask(proxy, "hi", "1/0", timeout=0.3)
        assert text_of(ask(proxy, "hi", "1/0"))
        assert proxy.stats()["joined"] == 1
        with pytest.raises(httpx.ReadTimeout):
            ask(proxy, "other", "1/0", timeout=0.3)
        wait_until(lambda: proxy.stats()["finished"] == 2, "the call goes on without a harness")
        began = time.monotonic()
        assert text_of(ask(proxy, "other", "1/0"))
        assert time.monotonic() - began < 0.9
    assert upstream.stats()["posts"] == 2


def test_equal_requests_at_the_same_time_get_different_answers(tmp_path, upstream):
    upstream.script(default={"latency": 0.2})
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        first = ask_all(proxy, [("hi", "")] * 8)
        assert len(set(first)) == 8
        proxy.begin_pass()
        again = ask_all(proxy, [("hi", "")] * 8)
    assert sorted(again) == sorted(first)
    assert upstream.stats()["posts"] == 8


def test_a_rollout_can_be_named_in_the_url(tmp_path, upstream):
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        by_header = text_of(ask(proxy, "hi", "17/3"))
        proxy.begin_pass()
        url = proxy.base_url.replace("/v1", "/rollout/17%2F3/v1/chat/completions")
        by_path = httpx.post(
            url, json={"model": "stub", "messages": [{"role": "user", "content": "hi"}]}, trust_env=False
        )
    assert text_of(by_path) == by_header
    assert by_path.headers["X-Modal-Eval-Source"] == "journal"


def test_the_accounts_tell_paid_from_replayed(tmp_path, upstream):
    upstream.script(default={"latency": 0.1})
    with running_proxy(tmp_path, upstream.base_url) as proxy:
        with in_background(lambda: ask(proxy, "hi", "1/0")):
            wait_until(lambda: proxy.stats()["in_flight"] == 1, "the call is on its way")
        proxy.begin_pass()
        ask(proxy, "hi", "1/0")
        ask(proxy, "hi", "1/1", stream=True, stream_options={"include_usage": True})
        stats = proxy.stats()
    assert (stats["finished"], stats["replayed"], stats["in_flight"], stats["waiting"]) == (2, 1, 0, 0)
    assert stats["completion_tokens"] == 8
    assert stats["replayed_completion_tokens"] == 4
    assert stats["tokens_per_s"] > 0
    assert stats["latency_ms"]["p50"] >= 100
    assert stats["first_token_ms"]["p50"] >= 100
    assert stats["busy_s"] >= 0.2
    assert stats["upstreams"][0]["served"] == 2
