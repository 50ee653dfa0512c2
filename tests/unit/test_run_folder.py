import json
import subprocess
import sys

import pytest

from modal_eval import paths
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.config.request import RunRequest
from modal_eval.errors import ConfigError, IdentityError, RunLockedError
from modal_eval.results.files import json_line, write_json
from modal_eval.results.run_folder import (
    Run,
    find_runs,
    is_asked_for,
    is_locked,
    latest_incomplete,
    locked,
    run_facts,
    run_group,
)
from modal_eval.stages.opening import open_run, plan_run


@pytest.fixture(autouse=True)
def output_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_OUTPUT_DIR", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def benchmark_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text("env_id: toy-env\nsampling: {temperature: 0.6}\neval: {rollouts: 2}\n")
    return str(path)


def config(model="org/model", **overrides):
    return resolve(model, BenchmarkConfig(name="toy", env_id="toy-env"), Overrides(**overrides))


def test_a_run_folder_is_named_by_environment_owner_model_and_a_fresh_id(output_root):
    run = Run.create(config())
    assert run.run_dir.parent == output_root / "toy-env--org--model"
    assert len(run.run_id) == 8
    assert int(run.run_id, 16) >= 0


@pytest.mark.parametrize(
    ("model", "group"),
    [
        ("org/model", "toy-env--org--model"),
        ("SmolLM2-135M-Instruct", "toy-env--SmolLM2-135M-Instruct"),
        ("/data/ckpt/run_step5", "toy-env--ckpt--run_step5"),
        ("s3://bucket/job/run_step5/", "toy-env--job--run_step5"),
    ],
)
def test_every_kind_of_model_gives_a_plain_folder_name(model, group):
    assert run_group(config(model)) == group


def test_run_config_holds_the_keys_that_other_tools_read():
    run = Run.create(config(sampling={"temperature": 0.8}))
    data = json.loads((run.run_dir / "run_config.json").read_text())
    for key in (
        "model_id",
        "model_slug",
        "benchmark",
        "server_profile",
        "sampling",
        "rollouts",
        "started_at",
        "checkpoint_dir",
    ):
        assert key in data
    assert data["benchmark"]["env_id"] == "toy-env"
    assert data["sampling"]["temperature"] == 0.8


def test_a_run_reads_back_as_it_was_written():
    run = Run.create(config(eval={"rollouts": 3}))
    assert Run.load(run.run_dir) == run


def test_a_folder_that_cannot_be_made_says_where_else_to_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written.*MODAL_EVAL_OUTPUT_DIR"):
        Run.create(config(), tmp_path / "file" / "run")


def test_a_second_writer_is_refused_with_the_holders_pid(tmp_path):
    script = "import sys, pathlib\nfrom modal_eval.results.run_folder import locked\nwith locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path)
        with pytest.raises(RunLockedError, match=f"pid {holder.pid} on "), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass
    assert not is_locked(tmp_path)


def test_the_folder_of_another_configuration_is_refused_by_name(benchmark_file):
    run_dir = open_run(RunRequest(model="org/model", benchmark=benchmark_file))
    from modal_eval.config.identity import config_identity

    Run.load(run_dir).claim_identity(config_identity(Run.load(run_dir).config))
    with pytest.raises(IdentityError, match=r"sampling.temperature: 0.6 in the folder, 0.1 now"):
        plan_run(RunRequest(run_dir=run_dir, overrides=Overrides(sampling={"temperature": 0.1})))
    with pytest.raises(IdentityError, match=r"model.id: 'org/model' in the folder, 'org/other' now"):
        plan_run(RunRequest(model="org/other", benchmark=benchmark_file, run_dir=run_dir))


def test_a_resume_may_ask_for_more_at_another_speed(benchmark_file):
    run_dir = open_run(RunRequest(model="org/model", benchmark=benchmark_file))
    open_run(RunRequest(run_dir=run_dir, overrides=Overrides(eval={"rollouts": 4, "max_concurrent": 2})))
    held = Run.load(run_dir).config
    assert (held.eval.rollouts, held.eval.max_concurrent, held.sampling.temperature) == (4, 2, 0.6)


@pytest.fixture
def scored_file(tmp_path):
    """A benchmark whose `mode` only scores."""
    path = tmp_path / "capitals.yaml"
    path.write_text("env_id: capitals\nscoring_args: [mode]\nenv_args: {mode: strict, level: 1}\n")
    return str(path)


def test_rows_that_have_a_score_refuse_another_scorer_and_name_the_command_that_scores_again(scored_file):
    run_dir = open_run(RunRequest(model="org/model", benchmark=scored_file))
    asked = RunRequest(run_dir=run_dir, overrides=Overrides(env={"mode": "very loose"}))
    pending = {"example_id": 0, "rollout": 0, "reward": None, "pending": True}
    (run_dir / paths.RESULTS).write_bytes(json_line(pending))
    assert plan_run(asked).config.env_args["mode"] == "very loose"
    (run_dir / paths.RESULTS).write_bytes(json_line({"example_id": 0, "rollout": 0, "reward": 0.0}))
    before = (run_dir / paths.RUN_CONFIG).read_bytes()
    for refused in (asked, asked.model_copy(update={"model": "org/model", "benchmark": "capitals"})):
        with pytest.raises(IdentityError) as told:
            open_run(refused)
        assert "env_args.mode: 'strict' in the folder, 'very loose' now" in str(told.value)
        assert f"`modal-eval score {run_dir} '--env.mode=very loose'`" in str(told.value)
    assert (run_dir / paths.RUN_CONFIG).read_bytes() == before


def test_a_retry_with_the_same_words_goes_on_with_rows_that_have_a_score(scored_file):
    asked = RunRequest(model="org/model", benchmark=scored_file, overrides=Overrides(env={"mode": "loose"}))
    again = asked.model_copy(update={"run_dir": open_run(asked)})
    (again.run_dir / paths.RESULTS).write_bytes(json_line({"example_id": 0, "rollout": 0, "reward": 1.0}))
    assert open_run(again) == open_run(RunRequest(run_dir=again.run_dir)) == again.run_dir
    with pytest.raises(IdentityError, match="env_args.mode: 'loose' in the folder, 'strict' now"):
        open_run(again.model_copy(update={"overrides": Overrides()}))  # the file is read again, and says `strict`


def test_a_new_run_needs_a_model_and_a_benchmark():
    with pytest.raises(ConfigError, match="-m MODEL -b BENCHMARK"):
        plan_run(RunRequest(model="org/model"))


def test_a_dry_run_writes_nothing(benchmark_file, output_root):
    plan_run(RunRequest(model="org/model", benchmark=benchmark_file))
    assert not output_root.exists()


def test_the_newest_incomplete_run_is_found_and_complete_ones_are_passed_over():
    older, newer = Run.create(config()), Run.create(config())
    older.update(started_at="2026-01-01T00:00:00+00:00")
    assert find_runs() == [newer.run_dir, older.run_dir]
    assert latest_incomplete("org/model", "toy") == newer.run_dir
    write_json(newer.run_dir / paths.METADATA, {"status": "complete", "avg_reward": 0.5})
    assert latest_incomplete("org/model", "toy") == older.run_dir
    assert run_facts(newer.run_dir)["avg_reward"] == 0.5
    with pytest.raises(ConfigError, match="no incomplete run for -m org/other"):
        latest_incomplete("org/other", None)


def test_a_run_is_found_by_the_words_that_it_was_begun_with(scored_file):
    run_dir = open_run(RunRequest(model="org/model@main", benchmark=scored_file))
    for model in ("org/model@main", "org/model", None):
        for benchmark in (scored_file, "elsewhere/capitals.yml", "capitals", None):
            assert latest_incomplete(model, benchmark) == run_dir
            assert is_asked_for(run_facts(run_dir), model, benchmark)
    for model, benchmark in (("org/model@other", None), ("org/mode", None), (None, "capital.yaml"), (None, "toy")):
        with pytest.raises(ConfigError, match="no incomplete run for "):
            latest_incomplete(model, benchmark)


def test_a_folder_with_a_sign_of_a_revision_in_its_name_is_found_while_it_is_there_and_after(tmp_path):
    folder = tmp_path / "ckpt@step5"
    folder.mkdir()
    run = Run.create(config(str(folder)))
    assert latest_incomplete(str(folder), None) == run.run_dir
    folder.rmdir()
    assert latest_incomplete(str(folder), None) == run.run_dir
