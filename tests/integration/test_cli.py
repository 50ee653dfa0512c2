"""The command line's manners: one line for what was typed wrong, data alone on stdout, secrets nowhere."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from modal_eval.processes import OwnedProcess
from modal_eval.serving.leases import note_server, take_lease
from tests.support.cli import FIXTURES, finished
from tests.support.upstream import upstream

KEY = "sesame-open-yourself-12345"
NOWHERE = "http://127.0.0.1:9"  # the discard service: nobody listens there
ENDPOINT = f"--infra.base_url={NOWHERE}/v1"

TYPED_WRONG = {
    "an option": (["run", "-m", "x", "-b", "demo", "--dryrun"], "Did you mean --dry-run?"),
    "a setting": (["run", "-m", "x", "-b", "demo", "--eval.rolouts=3"], "Did you mean --eval.rollouts?"),
    "a section": (["run", "-m", "x", "-b", "demo", "--samplin.seed=3"], "Did you mean --sampling.seed?"),
    "a command": (["rum", "-m", "x"], 'Did you mean "run"?'),
    "a benchmark": (["run", "-m", "x", "-b", "gsm8kk"], "Did you mean 'gsm8k'?"),
    "a benchmark's file": (["run", "-m", "x", "-b", "no/such.yaml"], "no/such.yaml does not exist"),
    "a number": (["run", "-m", "x", "-b", "demo", "--eval.rollouts=many"], "eval.rollouts='many'"),
    "a range": (["run", "-m", "x", "-b", "demo", "--sampling.temperature=3"], "sampling.temperature='3'"),
    "a repository": (["run", "-m", "x", "-b", "demo", "--push-to-hub=mine"], "owner/name"),
    "no model": (["run", "-b", "demo"], "MODAL_EVAL_MODEL"),
    "no benchmark": (["run", "-m", "x"], "MODAL_EVAL_BENCHMARK"),
    "no URL": (["run", "-m", "x", "-b", "demo", "--infra.target=endpoint"], "--infra.base_url="),
    "no URL but a host": (["run", "-m", "x", "-b", "demo", "--infra.base_url=host:80/v1"], "write http://HOST:PORT/v1"),
    "a password": (["run", "-m", "x", "-b", "demo", f"--infra.base_url=http://me:{KEY}@host/"], "--infra.api_key_env"),
    "no data file": (["run", "-m", "x", "-b", "gsm8k", "--env.data_files=no.jsonl"], "no.jsonl: no such file"),
    "no key": (["run", "-m", "x", "-b", "demo", ENDPOINT, "--infra.api_key_env=NO_SUCH_KEY"], "NO_SUCH_KEY"),
    "no run to resume": (["resume", "-m", "x"], "no incomplete run for -m x"),
    "no run folder": (["resume", "nowhere"], "nowhere is no run folder"),
    "no run to score": (["score", "nowhere"], "nowhere is no run folder"),
}


@pytest.mark.parametrize("name", TYPED_WRONG)
def test_what_was_typed_wrong_is_said_in_one_line_and_nothing_is_made(cli, name):
    arguments, way_out = TYPED_WRONG[name]
    ended = cli(*arguments, expect=2)
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("modal-eval: ")
    assert way_out in line
    assert KEY not in line
    assert list(cli.folder.iterdir()) == []


def test_a_typing_error_in_a_benchmark_file_names_the_file_and_the_nearest_key(cli):
    path = cli.benchmark(sampling={"temprature": 0})
    ended = cli("run", "-m", "x", "-b", path, expect=2)
    assert f"{path}: 'sampling.temprature' is no setting. Did you mean 'sampling.temperature'?" in ended.stderr


def test_a_prefect_server_that_is_not_there_ends_the_run_before_anything_is_made(cli):
    cli.env["PREFECT_API_URL"] = f"{NOWHERE}/api"
    ended = cli("run", "-m", "x", "-b", "demo", ENDPOINT, expect=1)
    (line,) = ended.stderr.splitlines()
    assert f"PREFECT_API_URL={NOWHERE}/api does not answer" in line
    assert "unset PREFECT_API_URL" in line
    assert not (cli.folder / "outputs").exists()


def test_an_unknown_model_ends_the_run_with_what_can_be_given(cli):
    ended = cli("run", "-m", "NoSuchModel", "-b", "demo", expect=1)
    assert "'NoSuchModel' is none on this disk; give -m path/to/model.gguf" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_model_that_the_endpoint_does_not_serve_is_told_with_those_it_serves(cli):
    with upstream() as server:
        ended = cli("run", "-m", "stbu", "-b", cli.benchmark(), f"--infra.base_url={server.base_url}", expect=2)
    assert "does not serve 'stbu' but stub. Did you mean 'stub'?" in ended.stderr


def test_a_dry_run_prints_the_configuration_and_the_plan_and_makes_nothing(cli):
    ended = cli("run", "-m", "x", "-b", "demo", "--eval.rollouts=3", ENDPOINT, "--dry-run")
    assert f"Would ask {NOWHERE}/v1 for 3 rollout(s) of all examples of demo" in ended.stdout
    assert "Nothing was started." in ended.stdout
    ended = cli("run", "-m", "x", "-b", "demo", "--eval.rollouts=3", "--dry-run", "--json")
    assert json.loads(ended.stdout)["eval"]["rollouts"] == 3
    assert ended.stderr == ""
    assert list(cli.folder.iterdir()) == []


def test_the_environment_names_the_model_the_benchmark_and_the_output_folder(cli):
    with upstream() as server:
        cli.env |= {"MODAL_EVAL_MODEL": "stub", "MODAL_EVAL_BENCHMARK": cli.benchmark()}
        cli.env["MODAL_EVAL_OUTPUT_DIR"] = str(cli.folder / "elsewhere")
        summary = json.loads(cli("run", f"--infra.base_url={server.base_url}", "--json").stdout)
    (run_dir,) = (cli.folder / "elsewhere" / "coin-env--stub").iterdir()
    assert summary["run_dir"] == str(run_dir)
    assert (summary["model"], summary["benchmark"]) == ("stub", "coins")


def test_json_stands_alone_on_stdout_whatever_the_command_says_besides(cli):
    with upstream() as server:
        arguments = ["-m", "stub", "-b", cli.benchmark(), f"--infra.base_url={server.base_url}", "--json"]
        first = json.loads(cli("run", *arguments).stdout)
        second = json.loads(cli("run", *arguments).stdout)
    assert first["status"] == "complete"
    assert first["avg_reward"] == second["avg_reward"]
    found = json.loads(cli("runs", "--json").stdout)
    assert [one["run_dir"] for one in found] == [second["run_dir"], first["run_dir"]]
    assert [one["run_dir"] for one in json.loads(cli("runs", "-l", "1", "--json").stdout)] == [second["run_dir"]]
    assert json.loads(cli("runs", "-b", "coins", "-m", "stub", "--json").stdout) == found
    assert json.loads(cli("runs", "-b", cli.benchmark(), "--json").stdout) == found
    assert json.loads(cli("runs", "-b", "gsm8k", "--json").stdout) == []
    scored = json.loads(cli("score", first["run_dir"], "--json").stdout)
    assert scored["avg_reward"] == first["avg_reward"]
    assert json.loads(cli("status", "--json").stdout) == json.loads(cli("stop", "--json").stdout) == []


def test_every_shipped_benchmark_is_listed(cli):
    found = {one["name"]: one for one in json.loads(cli("benchmarks", "--json").stdout)}
    assert {"gsm8k", "math500", "aime2025", "ifeval", "livecodebench", "demo"} <= set(found)
    shown = cli("benchmarks").stdout
    assert all(name in shown and found[name]["env_id"] in shown for name in found)


def test_the_endpoints_key_reaches_the_endpoint_and_nothing_else(cli):
    cli.env["UPSTREAM_KEY"] = KEY
    with upstream(latency=0.3, api_key=KEY) as server:
        process = cli.start("run", *cli.arguments(server.base_url, "--infra.api_key_env=UPSTREAM_KEY"))
        cli.wait_for(lambda: server.stats()["posts"] >= 1, process)
        command_lines = cli.mark.processes().values()
        ended = finished(process, 0)
        assert all(call["authorized"] for call in server.log())
    assert len(cli.rows()) == 10
    assert not [line for line in command_lines if KEY in line]
    assert KEY not in ended.stdout + ended.stderr
    assert files_with(KEY, cli.folder) == []


def test_a_wrong_key_is_told_with_the_option_that_names_the_right_one(cli):
    with upstream(api_key=KEY) as server:
        ended = cli("run", *cli.arguments(server.base_url), expect=1)
    assert "refuses us (401)" in ended.stderr
    assert "--infra.api_key_env=NAME" in ended.stderr


def test_a_password_in_a_benchmark_file_is_refused_before_anything_is_made_and_printed_nowhere(cli):
    path = cli.benchmark(infra={"base_url": f"https://me:{KEY}@host/v1"})
    for more in ([], ["--dry-run"], ["--run-dir", str(cli.run_dir)]):
        ended = cli("run", "-m", "x", "-b", path, *more, expect=2)
        assert "infra.base_url holds a user, a password or a query" in ended.stderr
        assert KEY not in ended.stdout + ended.stderr
    assert [one.name for one in cli.folder.iterdir()] == ["coins.yaml"]


def files_with(secret, folder):
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_terminal_shows_a_bar_with_the_score_the_speed_and_the_time_left(cli):
    with upstream(latency=0.4) as server:
        drawn = on_a_terminal(
            cli, "run", *cli.arguments(server.base_url, "--eval.rollouts=4", "--eval.max_concurrent=4")
        )
    assert re.search(r"generating ━+.* \d+/40 score 0\.\d{3} ± 0\.\d{3} · \d+ tok/s · 0:\d\d left", drawn)


def on_a_terminal(cli, *arguments):
    """What the command drew, without the codes that move and paint."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "modal_eval.cli", *arguments],
        env={**cli.env, "TERM": "xterm-256color"}, cwd=cli.folder, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs,
        start_new_session=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        drawn = b""
        try:
            while piece := os.read(ours, 65_536):
                drawn += piece
        except OSError:  # how Linux says that the other side has closed
            pass
        os.close(ours)
    assert process.returncode == 0, drawn.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())


def test_without_a_terminal_plain_lines_tell_the_stages_and_the_result_stands_alone(cli):
    with upstream(latency=0.4) as server:
        ended = cli("run", *cli.arguments(server.base_url, "--eval.max_concurrent=4"))
    lines = ended.stderr.splitlines()
    assert "preparing the model and the benchmark" in lines
    assert any(re.match(r"generating: \d+/10 rollouts · score ", line) for line in lines)
    assert "\x1b" not in ended.stderr + ended.stdout
    assert "stub on coins" in ended.stdout
    assert "10 of 10 rollouts scored" in ended.stdout


def test_help_names_the_commands_the_settings_and_the_exit_codes(cli):
    text = cli("--help").stdout
    assert "3 finished but incomplete" in text
    assert all(command in text for command in ("run", "resume", "score", "runs", "benchmarks", "status", "stop"))
    settings = cli("run", "--help").stdout
    assert all(option in settings for option in ("--eval.rollouts", "--sampling.temperature", "--infra.base_url"))


def test_settings_of_the_environment_come_through_typed(cli):
    ended = cli(
        "run", "-m", "x", "-b", cli.benchmark(), "--env.num=5", "--env.name=fast", '--env.deep={"a": [1]}', "--dry-run",
        "--json", f"--eval.module_paths={FIXTURES}",
    )  # fmt: skip
    assert json.loads(ended.stdout)["env_args"] == {"num": 5, "name": "fast", "deep": {"a": [1]}}


def test_stop_leaves_a_live_server_alone_unless_it_is_named(cli, monkeypatch):
    """This test holds the lease, so its server is a live run's."""
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", cli.env["MODAL_EVAL_STATE_DIR"])
    with OwnedProcess.start(["sleep", "600"]) as server:
        note_server(take_lease(cli.run_dir, "org/model", "0123abc"), server.pid, server.started, "http://127.0.0.1:9")
        assert json.loads(cli("stop", "--json").stdout) == []
        assert json.loads(cli("stop", "-m", "org/other", "--json").stdout) == []
        assert "-m org/model" in cli("stop", "-m", "org/model@main", expect=2).stderr
        assert server.poll() is None
        (stopped,) = json.loads(cli("stop", "-m", "org/model", "--json").stdout)
        assert stopped["server"] == f"pid {server.pid}"
        assert server.wait(20) == -signal.SIGTERM
