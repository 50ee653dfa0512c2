import json

import pytest

from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.results import progress as progress_module
from modal_eval.results.files import read_json
from modal_eval.results.progress import Progress, note_stage, timed
from modal_eval.results.run_folder import Run


@pytest.fixture
def run(tmp_path):
    settings = Overrides(eval={"rollouts": 2})
    return Run.create(resolve("org/m", BenchmarkConfig(name="toy", env_id="toy"), settings), tmp_path / "run")


def row(example_id, rollout=0, reward=1.0):
    return {"example_id": example_id, "rollout": rollout, "reward": reward}


def meta(run):
    return read_json(run.run_dir / "checkpoint_meta.json")


def test_an_example_is_complete_once_all_its_rollouts_are_scored(run):
    progress = Progress(run, total_examples=3)
    progress.add_known([row(0, 0), row(0, 1), row(1, 0), row(2, 0), row(2, 1, None)])
    said = progress.describe("generate")
    assert said["completed_example_ids"] == [0]
    assert (said["completed_rollouts"], said["unscored_rollouts"], said["total_rollouts"]) == (4, 1, 6)


def test_the_score_so_far_comes_with_its_error_and_leaves_out_what_is_unscored(run):
    progress = Progress(run, total_examples=3)
    progress.add_known([row(0, 0, 1.0), row(1, 0, 0.0), row(2, 0, None)])
    said = progress.describe("generate")
    assert said["avg_reward"] == 0.5
    assert said["stderr"] == pytest.approx(0.5)


def test_without_a_score_there_is_no_mean_and_no_time_left(run):
    said = Progress(run, total_examples=3).describe("generate")
    assert (said["avg_reward"], said["stderr"], said["seconds_left"]) == (None, None, None)


def test_the_time_left_counts_only_this_attempts_speed(run, monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    progress = Progress(run, total_examples=4)
    progress.add_known([row(example, rollout) for example in range(2) for rollout in range(2)])
    progress._count(row(2))
    progress._count(row(2, 1))
    assert progress.describe("generate")["seconds_left"] == pytest.approx(10.0)  # two in ten seconds, two are left


def test_a_rollout_that_is_scored_at_the_second_try_counts_once(run):
    progress = Progress(run, total_examples=1)
    progress.add_known([row(0, 0, None)])
    progress.add(row(0, 0, 1.0), {})
    assert progress.finished_rollouts == 1
    assert progress.describe("generate")["unscored_rollouts"] == 0


def test_the_file_is_written_at_most_twice_a_second_and_in_full_at_the_end(run):
    progress = Progress(run, total_examples=100)
    progress.write("generate")
    for example in range(50):
        progress.add(row(example), {"tokens_per_s": 12.0})
    assert meta(run)["completed_rollouts"] < 50
    progress.write("generated")
    assert (meta(run)["completed_rollouts"], meta(run)["stage"]) == (50, "generated")
    assert meta(run)["calls"] == {"tokens_per_s": 12.0}


def test_a_resume_keeps_the_start_and_adds_up_the_seconds_of_each_stage(run):
    path = run.run_dir / "checkpoint_meta.json"
    path.write_text(json.dumps({"start_time": "2026-01-01T00:00:00+00:00", "stage_seconds": {"deploy": 3.0}}))
    note_stage(run.run_dir, "generate", seconds=2.5)
    note_stage(run.run_dir, "generate", seconds=0.5)
    Progress(run, total_examples=1).write("generated")
    assert meta(run)["start_time"] == "2026-01-01T00:00:00+00:00"
    assert meta(run)["stage_seconds"] == {"deploy": 3.0, "generate": 3.0}


def test_what_a_stage_is_at_is_forgotten_when_it_ends(run):
    with timed(run.run_dir, "deploy"):
        note_stage(run.run_dir, "deploy", note="waiting for a GPU")
        assert meta(run)["note"] == "waiting for a GPU"
    assert "note" not in meta(run)


def test_a_stage_that_fails_is_timed_too(run):
    with pytest.raises(ValueError), timed(run.run_dir, "deploy"):
        int("no number")
    assert meta(run)["stage"] == "deploy"
    assert meta(run)["stage_seconds"]["deploy"] >= 0
