"""What the stages decide, without a server, a harness or a proxy."""

import json
from dataclasses import asdict

import pytest

from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.config.request import RunRequest
from modal_eval.errors import ConfigError, HarnessError, IdentityError
from modal_eval.harnesses.job import HarnessStart
from modal_eval.records import PreparedModel, ServerHandle
from modal_eval.results.files import json_line, read_json, write_json
from modal_eval.results.run_folder import Run
from modal_eval.stages import preparing
from modal_eval.stages.generating import (
    generate,
    known_rows,
    owed_and_answered,
    owed_rollouts,
    refuse_other_size,
    refuse_other_start,
)
from modal_eval.stages.opening import plan_run
from modal_eval.stages.preparing import harness_job, read_prepared
from modal_eval.stages.reporting import report
from modal_eval.stages.scoring import score
from modal_eval.stages.serving import proxy_fault, refuse_changed_server, teardown
from tasks.preparation import preparing_owed

MODEL = PreparedModel("org/m", "endpoint", None, "m", None, None, None, "server", None)


def config(**settings):
    return resolve("org/m", BenchmarkConfig(name="toy", env_id="toy"), Overrides(**settings))


@pytest.fixture
def run(tmp_path):
    """Two examples with two rollouts each, prepared."""
    run = Run.create(config(eval={"rollouts": 2}), tmp_path / "run")
    facts = {"harness": {"name": "verifiers"}, "environment": {"digest": "e1"}, "data": {"digest": "d1"}}
    write_json(run.run_dir / "prepared.json", {"model": asdict(MODEL), "total_examples": 2, **facts})
    write_json(run.run_dir / "checkpoint_meta.json", {"stage_seconds": {"generate": 2.5}})
    return run


def row(example_id, rollout=0, reward=1.0, **more):
    return {"example_id": example_id, "rollout": rollout, "reward": reward, **more}


def write_rows(run, *rows):
    (run.run_dir / "results.jsonl").write_bytes(b"".join(map(json_line, rows)))


def test_every_rollout_without_a_score_is_owed(run):
    assert owed_rollouts(run.run_dir) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    write_rows(run, row(0), row(0, 1, None, error={"fault": "server"}), row(1, 1, 0.0))
    assert owed_rollouts(run.run_dir) == {(0, 1), (1, 0)}


def test_a_run_that_another_node_began_is_prepared_again_only_where_a_server_is_needed(run, tmp_path):
    prepared = read_json(run.run_dir / "prepared.json")
    assert not preparing_owed(run.run_dir)
    for path, owed in ((tmp_path / "there", True), (tmp_path, False)):
        prepared["model"]["path"] = str(path)
        write_json(run.run_dir / "prepared.json", prepared)
        assert preparing_owed(run.run_dir) == owed
    prepared["model"]["path"] = str(tmp_path / "there")
    write_json(run.run_dir / "prepared.json", prepared)
    write_rows(run, *(row(example, rollout) for example in range(2) for rollout in range(2)))
    assert not preparing_owed(run.run_dir)
    (run.run_dir / "prepared.json").unlink()
    assert preparing_owed(run.run_dir)


def test_rows_beyond_what_is_asked_for_now_are_left_alone(run):
    write_rows(run, row(0), row(7), row(0, 5))
    assert set(known_rows(run.run_dir)) == {(0, 0)}


def test_no_server_is_tried_without_while_one_owed_rollout_has_no_answer(run):
    write_rows(run, row(0), row(0, 1), row(1))
    assert not owed_and_answered(run.run_dir)
    write_rows(run, row(0), row(0, 1), row(1), row(1, 1))
    assert not owed_and_answered(run.run_dir)


def test_nothing_owed_needs_no_proxy_and_something_owed_does(run):
    with pytest.raises(HarnessError, match="4 rollouts are owed, but there is no proxy"):
        generate(run.run_dir, None)
    write_rows(run, *(row(example, rollout) for example in range(2) for rollout in range(2)))
    assert generate(run.run_dir, None) == {"total_rollouts": 4, "finished_rollouts": 4, "unscored": 0}


def test_data_that_changed_its_size_since_it_was_prepared_is_refused():
    check = refuse_other_size(5)
    check(HarnessStart(5, 1, {}, {}, {}))
    with pytest.raises(HarnessError, match="has 4 examples now and had 5"):
        check(HarnessStart(4, 1, {}, {}, {}))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"harness": {"name": "verifiers", "version": "2"}}, "harness.version: None in the folder, '2' now"),
        ({"environment": {"digest": "e2"}}, "environment.digest: 'e1' in the folder, 'e2' now"),
        ({"data": {"digest": "d2"}}, "data.digest: 'd1' in the folder, 'd2' now"),
        ({"total_examples": 3, "data": {"digest": "d2"}}, "data.digest: 'd1' in the folder, 'd2' now"),
    ],
)
def test_a_harness_that_says_of_itself_another_thing_than_when_it_was_prepared_is_refused_by_name(run, changed, words):
    prepared = read_json(run.run_dir / "prepared.json")
    check = refuse_other_start(run.run_dir, prepared)
    said = {key: prepared[key] for key in ("total_examples", "harness", "environment", "data")}
    check(HarnessStart(rollouts=2, **said))
    with pytest.raises(IdentityError, match=words):
        check(HarnessStart(rollouts=2, **{**said, **changed}))


def test_scoring_puts_the_rows_in_order_one_a_rollout(run):
    write_rows(run, row(1, 1), row(0, 1, None, error={"fault": "server"}), row(1), row(0, 1, 0.0), row(0))
    assert score(run.run_dir) == 4
    lines = (run.run_dir / "results.jsonl").read_text().splitlines()
    assert [(one["example_id"], one["rollout"], one["reward"]) for one in map(json.loads, lines)] == [
        (0, 0, 1.0), (0, 1, 0.0), (1, 0, 1.0), (1, 1, 1.0),
    ]  # fmt: skip


def test_the_report_counts_what_was_never_generated_and_adds_up_the_tokens(run):
    usage = {"prompt_tokens": 10, "completion_tokens": 3}
    write_rows(run, row(0, usage=usage), row(0, 1, 0.0, usage=usage), row(1, usage=None))
    summary = report(run.run_dir)
    assert (summary["num_scored"], summary["unscored_by_fault"]) == (3, {"not generated": 1})
    assert summary["tokens"] == {"prompt": 20, "completion": 6}
    assert summary["time_ms"] == 2500.0
    assert read_json(run.run_dir / "metadata.json") == json.loads(json.dumps(summary))
    assert report(run.run_dir)["avg_reward"] == summary["avg_reward"]


def test_a_fault_of_the_proxy_is_told_with_the_way_out():
    assert proxy_fault({"retries": 3}) is None
    assert "free some space, then `modal-eval resume`" in proxy_fault({"journal_error": "No space left"})
    assert "cannot be reached: 503 since 600 s" in proxy_fault({"outage": "503 since 600 s"})


def test_an_endpoint_that_has_another_template_than_before_is_refused(run):
    run.set_identity({"version": 1})
    server = ServerHandle(
        ("http://127.0.0.1:9/v1",), "m", "endpoint", facts={"chat_template_sha256": "a", "version": "1"}
    )
    refuse_changed_server(run, server)
    refuse_changed_server(run, ServerHandle(server.base_urls, "m", "endpoint", facts={**server.facts, "version": "2"}))
    with pytest.raises(IdentityError, match="server_facts.chat_template_sha256: 'a' in the folder, 'b' now"):
        refuse_changed_server(run, ServerHandle(server.base_urls, "m", "endpoint", facts={"chat_template_sha256": "b"}))


def test_tearing_down_what_was_never_started_is_nothing(run):
    teardown(run.run_dir)
    teardown(run.run_dir)


def test_what_was_prepared_reads_back_equal(run, tmp_path):
    model = PreparedModel("org/m", "gguf", tmp_path / "m.gguf", "m", None, "sha256:1", tmp_path / "t", "benchmark", "2")
    prepared = {"model": {**asdict(model), "path": str(model.path), "chat_template": str(model.chat_template)}}
    write_json(run.run_dir / "prepared.json", prepared)
    assert read_prepared(run.run_dir)[0] == model
    write_json(run.run_dir / "prepared.json", {"model": asdict(MODEL)})
    assert read_prepared(run.run_dir)[0] == MODEL


def test_the_harness_is_asked_for_what_is_not_done_and_hears_no_null():
    job = harness_job(config(sampling={"seed": 7}), base_url="http://x/v1", model="m", done=frozenset({(0, 1)}))
    assert job.done == {(0, 1)}
    assert job.sampling == {"temperature": 1.0, "top_p": 1.0, "max_tokens": 4096, "seed": 7}


def test_preparing_is_done_again_when_the_models_file_or_the_settings_change(tmp_path):
    model = tmp_path / "m.gguf"
    model.write_bytes(b"one")

    def prints(folder, **settings):
        benchmark = BenchmarkConfig(name="toy", env_id="toy")
        return preparing.fingerprint(
            Run.create(resolve(str(model), benchmark, Overrides(**settings)), tmp_path / folder).run_dir
        )

    before = prints("a")
    assert prints("b", eval={"max_concurrent": 3}) == before
    assert prints("c", sampling={"temperature": 0.5}) != before
    model.write_bytes(b"another")
    assert prints("d") != before


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_preparing_is_done_again_when_what_the_environment_is_made_of_changes(tmp_path, monkeypatch):
    home, own, venv = tmp_path / "home", tmp_path / "own", tmp_path / "venv"
    installed = venv / "lib" / "python3.11" / "site-packages"
    write(installed / "capitals-1.0.dist-info" / "RECORD")
    write(own / "capitals.py")
    write(own / "other" / "big.bin")
    write(home / "benchmark_configs" / "templates" / "math.jinja", "{{ messages }}")
    monkeypatch.setenv("MODAL_EVAL_HOME", str(home))

    def prints(harness="verifiers"):
        benchmark = BenchmarkConfig(
            name="toy",
            env_id="org/capitals@1.0",
            chat_template="math",
            env_args={"include_path": str(tmp_path / "tasks")},
            eval={"module_paths": [str(own)], "environment": str(venv), "harness": harness},
        )
        folder = tmp_path / harness
        run = Run.load(folder) if folder.is_dir() else Run.create(resolve("org/m", benchmark), folder)
        return preparing.fingerprint(run.run_dir)

    def changes_with(act, harness="verifiers"):
        before = prints(harness)
        assert prints(harness) == before
        act()
        return prints(harness) != before

    assert changes_with(lambda: write(own / "capitals.py", "longer"))
    assert changes_with(lambda: write(own / "helper.py"))
    assert changes_with(lambda: write(own / "capitals" / "data.jsonl"))
    assert changes_with(lambda: write(home / "benchmark_configs" / "templates" / "math.jinja", "{{ question }}"))
    assert changes_with(lambda: write(installed / "capitals-1.1.dist-info" / "RECORD"))
    assert changes_with(lambda: monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(tmp_path / "mbpp.jsonl")))
    assert changes_with(lambda: write(tmp_path / "mbpp.jsonl"))
    for folder in (tmp_path / "tasks", home / "benchmark_configs" / "lm_eval_tasks" / "own"):
        assert changes_with(lambda folder=folder: write(folder / "task.yaml"), "lm_eval")
        assert not changes_with(lambda folder=folder: write(folder / "another.yaml"))
    assert not changes_with(lambda: write(own / "capitals" / "__pycache__" / "capitals.pyc"))
    assert not changes_with(lambda: write(own / "other" / "big.bin", "longer"))
    assert not changes_with(lambda: write(home / "benchmark_configs" / "templates" / "base.jinja"))


def test_a_new_run_without_its_endpoints_key_is_refused_and_a_resume_may_need_none(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    infra = {"base_url": "http://127.0.0.1:9/v1", "api_key_env": "NO_SUCH_KEY"}
    with pytest.raises(ConfigError, match="NO_SUCH_KEY, but that environment variable is not set; export it"):
        plan_run(RunRequest(model="m", benchmark="demo", overrides=Overrides(infra=infra)))
    held = Run.create(config(infra=infra), tmp_path / "held")
    assert plan_run(RunRequest(run_dir=held.run_dir)).config == held.config
