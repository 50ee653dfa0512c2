"""Suites before anything is started: what is asked, which servers are shared, how the table is made."""

import csv
import io
import json

import pytest

from modal_eval import serving
from modal_eval.checkpoints.resolve import label
from modal_eval.config.jobs import load_jobs
from modal_eval.config.models import Overrides
from modal_eval.config.request import SuiteRequest
from modal_eval.config.suites import load_suite, resolve_suite, serving_key, suite_files
from modal_eval.errors import ConfigError, IdentityError
from modal_eval.processes import OwnedProcess
from modal_eval.stages.suites import KEEP_S, Suite, failed, give_back, owed
from tests.support.leases import server_of


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path / "outputs"))


def suite_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", suite_files())
def test_every_shipped_suite_resolves(name):
    suite = load_suite(name)
    assert set(resolve_suite("org/model", suite, Overrides())) == {entry.name for entry in suite.benchmarks}


def test_the_base_suite_needs_one_server_and_keeps_it_between_its_benchmarks():
    suite = Suite.open(SuiteRequest(model="org/model", suite="base"))
    assert len(suite.entries) == 5
    assert {entry.server for entry in suite.entries} == {suite.entries[0].server}
    assert {entry.overrides.infra.keep for entry in suite.entries} == {KEEP_S}
    assert len({entry.run_id for entry in suite.entries}) == 5


def test_a_server_of_one_benchmark_alone_is_not_kept(tmp_path):
    suite = Suite.open(SuiteRequest(model="m", suite=suite_file(tmp_path, "benchmarks: [demo, gsm8k]")))
    assert [entry.overrides.model_dump() for entry in suite.entries] == [{}, {}]


def test_a_kept_server_that_cannot_be_given_back_keeps_no_other_and_no_result(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    suite = Suite.open(SuiteRequest(model="m", suite="base"))
    ours = {"run_dir": str(suite.run_dir(suite.entries[0])), "kept": True}
    with OwnedProcess.start(["sleep", "600"]) as unreachable, OwnedProcess.start(["sleep", "600"]) as kept:
        server_of("a", unreachable, host="another-node", app="vllm-m-1", **ours)
        server_of("b", kept, **ours)
        give_back(suite)
        assert kept.wait(30) is not None
        assert unreachable.poll() is None
    assert [one.lease_id for one in serving.leases()] == ["a"]
    assert "vllm-m-1 could not be given back" in caplog.text
    assert "`modal-eval stop` ends it" in caplog.text


def test_what_is_given_wins_over_the_entry_and_the_entry_over_the_suite(tmp_path):
    text = """
overrides: {sampling: {temperature: 0.1, top_p: 0.5, max_tokens: 7}}
benchmarks: [{benchmark: demo, overrides: {sampling: {top_p: 0.6, max_tokens: 8}}}]
"""
    given = Overrides.model_validate({"sampling": {"max_tokens": 9}})
    (config,) = resolve_suite("m", load_suite(suite_file(tmp_path, text)), given).values()
    assert (config.sampling.temperature, config.sampling.top_p, config.sampling.max_tokens) == (0.1, 0.6, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmarks: [demo, demo]", "demo stands in the suite twice"),
        ("benchmarks: [dmeo]", "Did you mean 'demo'"),
        ("benchmarks: []", "at least 1 item"),
        ("benchmark: [demo]", "'benchmark' is no setting"),
        ("[demo]", "holds list"),
    ],
)
def test_a_wrong_suite_is_refused_with_its_reason(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(suite_file(tmp_path, text))


def test_a_wrong_setting_of_one_benchmark_starts_none(tmp_path):
    request = SuiteRequest(
        model="m", suite="math", overrides=Overrides.model_validate({"eval": {"rollouts": 2, "k": [4]}})
    )
    with pytest.raises(ConfigError, match="pass@4"):
        Suite.open(request)
    assert not (tmp_path / "outputs").exists()


def test_only_what_makes_a_server_tells_servers_apart():
    def key(**settings):
        configs = resolve_suite("m", load_suite("base"), Overrides.model_validate(settings))
        return serving_key(configs["gsm8k_8shot"])

    assert key() == key(sampling={"temperature": 1.0}, eval={"rollouts": 3}, infra={"timeout": 5})
    assert len({key(), key(vllm={"max_model_len": 8192}), key(vllm={"seed": 1}), key(infra={"gpu": "H100"})}) == 4


def test_a_suite_that_is_opened_again_owes_what_failed_and_refuses_another_model(tmp_path):
    request = SuiteRequest(model="m", suite="chat", suite_dir=tmp_path / "suite")
    suite = Suite.open(request)
    done = {
        "benchmark": "gsm8k",
        "status": "complete",
        "avg_reward": 0.5,
        "stderr": 0.1,
        "num_scored": 9,
        "run_dir": "r",
    }
    suite.note(done)
    suite.note(failed("ifeval", "no\nserver | today"))
    table = (tmp_path / "suite" / "table.md").read_text()
    assert "| gsm8k | 0.500 ± 0.100 |  | 9 |  | complete |" in table
    assert "* **ifeval**: no server | today" in table
    rows = {
        row["benchmark"]: row for row in csv.DictReader(io.StringIO((tmp_path / "suite" / "table.csv").read_text()))
    }
    assert (rows["gsm8k"]["avg_reward"], rows["ifeval"]["avg_reward"], rows["mbpp"]["status"]) == ("0.5", "", "owed")
    again = Suite.open(request)
    assert again.outcomes() == [owed("ifeval"), done, owed("humaneval"), owed("mbpp")]
    assert [entry.run_id for entry in again.entries] == [entry.run_id for entry in suite.entries]
    with pytest.raises(IdentityError, match="suite chat of m"):
        Suite.open(request.model_copy(update={"model": "other"}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "no list of jobs"),
        ("[", "not valid JSON"),
        ('[{"checkpoint_path": "/a"}]', "job 1: 'output_name' is missing"),
        ('[{"checkpoint_path": "/a", "output_name": "x"}, {"checkpoint_path": "/b", "output_name": "x"}]', "twice"),
    ],
)
def test_a_wrong_file_of_jobs_is_refused_with_its_reason(tmp_path, content, message):
    (tmp_path / "jobs.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_jobs(tmp_path / "jobs.json")


def test_a_file_of_jobs_is_read_as_the_team_writes_it(tmp_path):
    (tmp_path / "jobs.json").write_text(json.dumps([{"checkpoint_path": "/ckpt1", "output_name": "exp1_step100"}]))
    (job,) = load_jobs(tmp_path / "jobs.json")
    assert (job.checkpoint_path, job.output_name, job.slug) == ("/ckpt1", "exp1_step100", "exp1_step100")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s3://bucket/job/mixed_lr1e5_step40/", "mixed_lr1e5@40"),
        ("models/8b/hf/step-127120", "8b@127120"),
        ("checkpoints/run_step400", "run@400"),
        ("/a/b/run_final", "run_final"),
        ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B"),
        ("s3://bucket/step-3", "bucket@3"),
        ("s3://", "s3://"),
    ],
)
def test_a_model_is_called_by_its_run_and_step(name, said):
    assert label(name) == said
