"""Everything that dies, lies or fills up on the way: nothing finished is lost or paid twice, and nothing is left behind.

Each test runs the real command line with a real harness process; the server is scripted to misbehave.
"""

import json
import os
import random
import signal
import subprocess

import pytest

from tests.support.cli import finished, kill, repeated
from tests.support.upstream import upstream

QUICK = ("--eval.retries=20",)


def test_the_command_killed_at_ten_random_moments_ends_with_what_an_undisturbed_run_has(cli, mark):
    chance = random.Random(20261121)
    settings = ("--eval.num_examples=20", "--eval.rollouts=4")
    benchmark = cli.benchmark(env_args={"num": 20})
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url, *settings, benchmark=benchmark))
        undisturbed = cli.rows()
        assert len(undisturbed) == 80
    cli.run_dir = cli.folder / "killed"
    with upstream(latency=0.2) as server:
        kills, in_transit = 0, set()
        for attempt in range(40):
            command = "run" if attempt == 0 else "resume"
            arguments = (
                cli.arguments(server.base_url, *settings, benchmark=benchmark) if attempt == 0 else [str(cli.run_dir)]
            )
            process = cli.start(command, *arguments)
            if kills == 10:
                finished(process, 0)
                break
            target = server.stats()["posts"] + chance.randint(0, 12)
            cli.wait_for(lambda target=target: server.stats()["posts"] >= target and chance.random() < 0.2, process)
            kills += process.poll() is None
            kill(process)
            assert mark.wait_until_gone() == {}
            in_transit |= cli.in_transit(server)
        assert kills == 10
        assert cli.rows() == undisturbed
        assert repeated(server) <= in_transit
        assert len(in_transit) <= 10 * 8  # eight calls in flight at each of ten kills


def test_a_killed_harness_is_started_again_and_nothing_is_asked_twice(cli):
    with upstream(latency=0.3) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--eval.max_concurrent=4"))
        cli.wait_for(lambda: server.stats()["posts"] >= 10, process)
        os.kill(cli.process_of("adapters/run.py"), signal.SIGKILL)
        finished(process, 0)
        assert len(cli.rows()) == 40
        assert server.stats()["repeated_after_finish"] == {}


@pytest.mark.parametrize("victim", ["modal_eval.proxy"])
def test_a_killed_proxy_ends_the_run_with_the_way_out_and_resume_finishes_it(cli, victim):
    with upstream(latency=0.3) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--eval.max_concurrent=4"))
        cli.wait_for(lambda: server.stats()["posts"] >= 10, process)
        os.kill(cli.process_of(victim), signal.SIGKILL)
        ended = finished(process, 1)
        assert "the proxy" in ended.stderr
        assert "killed by signal 9" in ended.stderr
        assert "Traceback" not in ended.stderr
        in_transit = cli.in_transit(server)
        cli("resume", str(cli.run_dir))
        assert len(cli.rows()) == 40
        assert repeated(server) <= in_transit
        assert len(in_transit) <= 4


def test_two_interrupts_tear_everything_down_once_and_resume_goes_on(cli, mark):
    with upstream(latency=0.3) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--eval.max_concurrent=4"))
        cli.wait_for(lambda: server.stats()["posts"] >= 10, process)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        ended = finished(process, 130)
        assert "`modal-eval resume` goes on" in ended.stderr
        assert "Traceback" not in ended.stderr
        assert mark.wait_until_gone() == {}
        cli("resume", "-m", "stub", str(cli.run_dir))
        assert len(cli.rows()) == 40
        assert server.stats()["repeated_after_finish"] == {}


FAULTS = {
    "429 with Retry-After": {"status": 429, "retry_after": "1"},
    "500": {"status": 500},
    "503": {"status": 503},
    "no answer at all": {"fault": "close"},
    "HTML instead of JSON": {"fault": "html"},
    "broken JSON": {"fault": "broken_json"},
    "half an answer": {"fault": "cut"},
    "a silent socket": {"fault": "silent"},
}


def test_every_fault_of_the_server_on_every_call_changes_nothing_in_the_end(cli):
    """Each call meets another fault first; the answers that count are the second ones."""
    benchmark = cli.benchmark(env_args={"num": 16})
    quick = ("--infra.silence_timeout=2", "--eval.max_concurrent=16")
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url, benchmark=benchmark))
        undisturbed = cli.rows()
    cli.run_dir = cli.folder / "disturbed"
    with upstream() as server:
        server.script(
            rules=[
                {"behaviour": fault, "asks": 1, "tag": f"{example}/0"}
                for number, fault in enumerate(FAULTS.values())
                for example in (number, number + len(FAULTS))
            ]
        )
        cli("run", *cli.arguments(server.base_url, *quick, benchmark=benchmark))
        assert cli.rows() == undisturbed
        assert server.stats()["posts"] >= 32
        faults = cli.metadata()["calls"]["faults"]
        assert {"status_429", "status_500", "status_503", "silent", "no_json", "dropped"} <= set(faults)


def test_an_outage_is_waited_out(cli):
    """Five minutes, with the clock shortened: six seconds of refused connections in the middle of a run."""
    with upstream(latency=0.2) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--infra.outage_timeout=60"))
        cli.wait_for(lambda: server.stats()["posts"] >= 10, process)
        server.outage(6)
        finished(process, 0)
        assert len(cli.rows()) == 40
        assert cli.metadata()["num_unscored"] == 0
        assert server.stats()["repeated_after_finish"] == {}


def test_a_server_that_stays_away_ends_the_run_unscored_and_resume_finishes_it(cli):
    with upstream(latency=0.2) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--infra.outage_timeout=2"))
        cli.wait_for(lambda: server.stats()["posts"] >= 10, process)
        server.outage(3600)
        ended = finished(process, 1)
        assert "cannot be reached" in ended.stderr
        assert not any(row["reward"] == 0 and row["error"] for row in cli.rows())
        server.outage(0)
        cli("resume", str(cli.run_dir))
        assert len(cli.rows()) == 40
        assert server.stats()["repeated_after_finish"] == {}


def test_sixty_hops_of_303_cost_exactly_one_post_a_rollout(cli):
    with upstream(hops=60, cut=0.01) as server:
        cli("run", *cli.arguments(server.base_url))
        stats = server.stats()
        assert stats["posts"] == len(cli.rows()) == 10
        assert stats["gets"] >= 600


def test_a_fault_that_never_ends_is_unscored_and_never_a_zero(cli):
    with upstream() as server:
        server.script(rules=[{"behaviour": {"status": 500}, "tag": "3/0"}])
        ended = cli("run", *cli.arguments(server.base_url, "--eval.retries=1"), expect=3)
        (lost,) = [row for row in cli.rows() if row["error"]]
        assert (lost["example_id"], lost["reward"], lost["error"]["fault"]) == (3, None, "server")
        assert cli.metadata()["unscored_by_fault"] == {"server": 1}
        assert "this is no score yet" in ended.stderr
        server.script(rules=[])
        cli("resume", str(cli.run_dir))
        assert cli.metadata()["num_unscored"] == 0


def test_an_example_that_never_ends_is_unscored_and_the_others_are_not_held_up(cli):
    with upstream() as server:
        benchmark = cli.benchmark(env_args={"hangs": 4})
        cli("run", *cli.arguments(server.base_url, "--eval.rollout_timeout=4", benchmark=benchmark), expect=3)
        assert [row["example_id"] for row in cli.rows() if row["reward"] is None] == [4]
        assert cli.metadata()["unscored_by_fault"] == {"timeout": 1}


def test_an_environment_that_raises_on_an_example_leaves_it_unscored(cli):
    with upstream() as server:
        benchmark = cli.benchmark(env_args={"raises": 2})
        cli("run", *cli.arguments(server.base_url, "--eval.max_unscored=0.2", benchmark=benchmark), expect=0)
        (lost,) = [row for row in cli.rows() if row["reward"] is None]
        assert "coin 2 is lost" in lost["error"]["message"]
        assert cli.metadata()["num_scored"] == 9


def test_torn_last_lines_are_owed_again(cli):
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url))
        undisturbed = cli.rows()
        for name in ("checkpoint.jsonl", "results.jsonl"):
            path = cli.run_dir / name
            path.write_bytes(path.read_bytes()[:-20])
        cli("resume", str(cli.run_dir))
        assert cli.rows() == undisturbed
        assert server.stats()["posts"] == 11


def test_a_second_run_on_the_folder_is_refused_with_the_holder(cli):
    with upstream(latency=600) as server:  # the first one is there for as long as the second one needs
        process = cli.start("run", *cli.arguments(server.base_url))
        cli.wait_for(lambda: server.stats()["posts"] >= 1, process)
        second = cli("resume", str(cli.run_dir), expect=2)
        assert f"pid {process.pid} on " in second.stderr
        process.send_signal(signal.SIGINT)
        finished(process, 130)


def test_a_full_disk_loses_nothing_that_was_finished(cli):
    """The run folder stands on a small file system; when it is full the run ends, when there is room it goes on."""
    disk = cli.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        cli.run_dir = disk / "run"
        with upstream(latency=0.2) as server:
            process = cli.start("run", *cli.arguments(server.base_url, "--eval.rollouts=8", "--eval.max_concurrent=4"))
            cli.wait_for(lambda: server.stats()["posts"] >= 10, process)
            fill(disk / "ballast")
            ended = finished(process, 1)
            assert "No space left" in ended.stderr or "is full" in ended.stderr
            assert "Traceback" not in ended.stderr
            (disk / "ballast").unlink()
            cli("resume", str(cli.run_dir))
            assert len(cli.rows()) == 80
            assert server.stats()["repeated_after_finish"] == {}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(path):
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65_536)
        except OSError:
            pass


def test_an_output_folder_that_cannot_be_written_is_said_in_one_line(cli):
    (cli.folder / "file").write_text("")
    cli.env["MODAL_EVAL_OUTPUT_DIR"] = str(cli.folder / "file" / "outputs")
    ended = cli("run", "-m", "stub", "-b", cli.benchmark(), "--infra.base_url=http://127.0.0.1:9/v1", expect=2)
    assert "cannot be written" in ended.stderr
    assert "MODAL_EVAL_OUTPUT_DIR" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_another_model_temperature_template_or_data_file_is_refused_by_name(cli):
    data = cli.folder / "data.jsonl"
    data.write_text('{"question": "a", "answer": "#### 1"}\n')
    benchmark = cli.benchmark(env_id="gsm8k", env_args={"data_files": str(data)})
    with upstream() as server:
        arguments = cli.arguments(server.base_url, benchmark=benchmark)
        cli("run", *arguments)
        before = server.stats()["posts"]
        for change, named in (
            (["-m", "other"], "model.id: 'stub' in the folder, 'other' now"),
            (["--sampling.temperature=0.25"], "sampling.temperature: 1.0 in the folder, 0.25 now"),
            (["--vllm.dtype=float32"], "server.dtype"),
        ):
            refused = cli("resume", str(cli.run_dir), *change, expect=2)
            assert named in refused.stderr
        data.write_text('{"question": "a", "answer": "#### 2"}\n')
        assert "data_files" in cli("resume", str(cli.run_dir), expect=2).stderr
        data.write_text('{"question": "a", "answer": "#### 1"}\n')
        other_template = json.loads((cli.folder / "coins.yaml").read_text()) | {"chat_template": "think"}
        (cli.folder / "coins.yaml").write_text(json.dumps(other_template))
        assert "chat_template" in cli("run", *arguments, expect=2).stderr
        assert server.stats()["posts"] == before


def test_a_finished_run_is_scored_again_without_any_server(cli):
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url, "--eval.rollouts=3"))
        rows = cli.rows()
    cli("score", str(cli.run_dir))
    assert cli.rows() == rows


def test_a_run_whose_calls_are_all_in_the_journal_is_finished_without_a_server(cli):
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url))
        rows = cli.rows()
    (cli.run_dir / "results.jsonl").write_text("")
    cli("resume", str(cli.run_dir))
    assert cli.rows() == rows


CAPITALS = """
import verifiers as vf
from datasets import Dataset
from pathlib import Path


def load_environment() -> vf.Environment:
    ask = Path(FILE).read_text()
    rows = [{"question": f"{ask} capital {i}", "answer": str(i)} for i in range(10)]
    return vf.SingleTurnEnv(eval_dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[lambda completion: 1.0]))
"""


@pytest.mark.parametrize("edited", ["its module", "a file that it reads from elsewhere"])
def test_an_environment_that_was_edited_since_is_refused_by_name_and_no_old_answer_is_used_for_it(cli, mark, edited):
    asks, folder = cli.folder / "asks.txt", cli.folder / "environments"
    folder.mkdir()
    asks.write_text("Name")
    module = folder / "capitals.py"
    module.write_text(CAPITALS.replace("FILE", repr(str(asks))))
    benchmark = cli.benchmark(env_id="capitals", eval={"module_paths": [str(folder)], "max_concurrent": 2})
    with upstream(latency=0.3) as server:
        process = cli.start("run", *cli.arguments(server.base_url, benchmark=benchmark))
        cli.wait_for(lambda: server.stats()["posts"] >= 4, process)
        kill(process)
        assert mark.wait_until_gone() == {}
        before = cli.rows()
        place = module if edited == "its module" else asks
        original = place.read_text()
        place.write_text(original + "# in another way\n")
        said = cli("resume", str(cli.run_dir), expect=2).stderr
        assert ("environment.sha256: " if edited == "its module" else "data.sha256: ") in said
        assert "belongs to another configuration" in said
        assert cli.rows() == before
        place.write_text(original)
        cli("resume", str(cli.run_dir))
        assert sorted(row["prompt"][0]["content"] for row in cli.rows()) == [f"Name capital {i}" for i in range(10)]
