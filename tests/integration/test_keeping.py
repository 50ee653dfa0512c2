"""Servers of this machine that outlive their run: real keepers, real llama.cpp, leased GPUs whose driver is a stand-in."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from modal_eval import serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides, RunConfig
from modal_eval.errors import GpuError, ServerError
from modal_eval.processes import is_alive
from modal_eval.records import ServerHandle
from modal_eval.serving import keeping, sharing
from modal_eval.serving.leases import write_lease
from tests.support.cli import Cli
from tests.support.gpus import Machine
from tests.support.processes import Mark, until

MODEL = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mark: Mark) -> Iterator[Machine]:
    """The stand-in machine, seen from this process, with a state folder of the test's own; what is left is an error."""
    machine.enter(monkeypatch)
    for name, value in {**machine.variables, "MODAL_EVAL_STATE_DIR": str(tmp_path / "state")}.items():
        monkeypatch.setenv(name, value)
    for name in ("MODAL_EVAL_TEST_MARK",):
        monkeypatch.setenv(name, mark.env[name])
    yield machine
    serving.stop_all(serving.servers())
    others = {pid: line for pid, line in mark.processes().items() if pid != os.getpid()}
    assert others == {}


def config(keep: int = 600, target: str = "node", *, infra: dict[str, Any] | None = None, **vllm: Any) -> RunConfig:
    benchmark = BenchmarkConfig(name="toy", env_id="toy", eval={"max_concurrent": 2})
    asked = {
        "infra": {"engine": "llamacpp", "target": target, "gpu_wait": 0, "keep": keep, **(infra or {})},
        "vllm": vllm,
    }
    return resolve(MODEL, benchmark, Overrides.model_validate(asked))


def start(folder: Path, wanted: RunConfig, heard: list[str] | None = None) -> ServerHandle:
    say = (lambda _: None) if heard is None else heard.append
    return serving.start_server(wanted, resolve_model(wanted), folder, say=say)


def answers(handle: ServerHandle) -> bool:
    try:
        return httpx.get(f"{handle.base_urls[0]}/models", timeout=30).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def processes() -> list[tuple[int, float]]:
    """Every process that a server of this state has, with its start: keepers and replicas."""
    (server,) = serving.servers()
    pids = {(one.holder_pid, one.holder_started) for one in server.processes}
    return [*pids, *((one.server_pid, one.server_started) for one in server.processes)]


def test_a_kept_server_outlives_its_run_is_shared_by_two_and_is_gone_after_the_stop(here: Machine, tmp_path: Path):
    handle = start(tmp_path / "first", config())
    assert here.leased() == [0]
    serving.stop_server(handle)
    assert answers(handle)
    (server,) = serving.servers()
    assert [one.kept for one in server.leases] == [True]
    assert time.time() + 500 < (server.deadline or 0) < time.time() + 600
    assert "llama" in (tmp_path / "first" / "logs" / "llamacpp.log").read_text().lower()
    heard: list[str] = []
    second, third = start(tmp_path / "second", config(keep=0), heard), start(tmp_path / "third", config(keep=0))
    assert second.base_urls == third.base_urls == handle.base_urls
    assert any("is running already and is shared" in line for line in heard)
    assert here.leased() == [0]
    started = processes()
    serving.stop_server(second)
    serving.stop_server(third)
    assert answers(handle)
    assert serving.clean().deeds == []
    assert [deed.outcome for deed in serving.stop_all(serving.servers()).deeds] == ["stopped"]
    assert not any(is_alive(*one) for one in started)
    assert here.leased() == []
    assert serving.leases() == []


def test_another_configuration_gets_a_server_of_its_own(here: Machine, tmp_path: Path):
    kept = start(tmp_path, config())
    other = start(tmp_path, config(keep=0, seed=7))
    assert other.base_urls != kept.base_urls
    assert other.kept is None
    assert here.leased() == [0, 1]
    serving.stop_server(other)
    assert here.leased() == [0]
    wanted = config()
    names = {
        keeping.name_of(wanted, model, say=print)
        for model in (resolve_model(wanted), replace(resolve_model(wanted), digest="sha256:other"))
    }
    assert len(names) == 2


def test_a_kept_server_ends_by_itself_at_its_deadline(here: Machine, tmp_path: Path):
    handle = start(tmp_path, config(keep=1, target="local"))
    started = processes()
    assert answers(handle)
    serving.stop_server(handle)
    until(lambda: not any(is_alive(*one) for one in started))
    until(lambda: serving.leases() == [])
    assert here.leased() == []


HOLDER = """if True:
    import pathlib, sys
    from tests.integration.test_keeping import config, start
    print(start(pathlib.Path(sys.argv[1]), config()).kept, flush=True)
    sys.stdin.read()
    """


def test_a_run_that_is_killed_keeps_nothing(here: Machine, tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline().startswith("llamacpp-SmolLM2")
        started = processes()
        holder.kill()
    until(lambda: not any(is_alive(*one) for one in started))
    until(lambda: here.leased() == [])
    assert serving.clean().faults == []
    assert serving.leases() == []


def test_a_killed_keeper_takes_its_server_along_and_the_next_run_starts_anew(here: Machine, tmp_path: Path):
    handle = start(tmp_path, config())
    (keeper, keeper_started), server = processes()
    os.kill(keeper, signal.SIGKILL)
    until(lambda: not is_alive(keeper, keeper_started) and not is_alive(*server))
    until(lambda: serving.server_exit(handle) is not None)
    assert f"(pid {keeper}) has ended" in str(serving.server_exit(handle))
    serving.stop_server(handle)
    again = start(tmp_path, config())
    assert answers(again)
    assert here.leased() == [0]
    serving.stop_server(again)


def test_a_keeper_that_hangs_is_ended_with_its_server_once_the_deadline_has_passed(
    here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(keeping, "END_S", 0.5)
    monkeypatch.setattr("modal_eval.processes.kill_group.__defaults__", (0.5,))
    serving.stop_server(start(tmp_path, config()))
    started = processes()
    os.kill(started[0][0], signal.SIGSTOP)
    (kept,) = sharing.shares(serving.servers()[0].app)
    write_lease(replace(kept, deadline=time.time() - 1))
    (deed,) = serving.clean().deeds
    assert (deed.outcome, deed.reason) == ("stopped", "its deadline has passed")
    assert not any(is_alive(*one) for one in started)
    until(lambda: here.leased() == [])
    assert serving.leases() == []


def test_a_server_that_cannot_start_is_told_with_its_last_words_and_leaves_nothing(here: Machine, tmp_path: Path):
    with pytest.raises(ServerError, match=r"exited with 2; the end of .*llamacpp.log(.|\n)*argument --slots"):
        start(tmp_path, config(extra_args={"slots": "many"}))
    assert serving.leases() == []
    assert here.leased() == []
    assert "argument --slots" in (tmp_path / "logs" / "llamacpp.log").read_text()
    here.set("count", "1")
    holder = start(tmp_path, config(keep=0))
    with pytest.raises(GpuError, match=r"no GPU after 0 s: waiting for a GPU, place 1 of 1 in the queue; GPU 0:"):
        start(tmp_path, config())
    serving.stop_server(holder)


def test_a_kept_server_that_dies_for_good_tells_its_last_words_and_is_shared_no_more(here: Machine, tmp_path: Path):
    wanted = config(infra={"max_restarts": 0})
    first, second = start(tmp_path, wanted), start(tmp_path, wanted)
    pid = processes()[1][0]
    os.kill(pid, signal.SIGKILL)
    until(lambda: serving.server_exit(first) is not None)
    until(lambda: serving.server_exit(second) is not None)
    assert f"the model server (pid {pid}) was killed by signal 9" in str(serving.server_exit(first))
    again = start(tmp_path, wanted)
    assert answers(again)
    for handle in (first, second, again):
        serving.stop_server(handle)
    assert answers(again)
    assert here.leased() == [0]


def test_a_kept_replica_that_dies_is_started_again_by_its_keeper(here: Machine, tmp_path: Path):
    handle = start(tmp_path, config())
    _, (pid, started) = processes()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid, started) and answers(handle))
    assert serving.server_exit(handle) is None
    assert here.leased() == [0]
    serving.stop_server(handle)


def test_two_runs_of_the_command_use_one_kept_server_which_status_shows_and_stop_ends(cli: Cli, machine: Machine):
    machine.set("count", "1")
    cli.env = machine.env(cli.env)
    words = ["-m", MODEL, "-b", "demo", "--infra.target=node", "--eval.num_examples=2", "--sampling.max_tokens=8"]
    cli("run", *words, "--run-dir", str(cli.run_dir), "--keep")
    (shown,) = json.loads(cli("status", "--json").stdout)
    assert (shown["holder"], shown["gpus"], shown["cost"]) == ("kept", 1, None)
    assert machine.leased() == [0]
    cli("run", *words, "--run-dir", str(cli.folder / "second"))
    log = (cli.folder / "second" / "logs" / "flow.log").read_text()
    assert f"{shown['server']} is running already and is shared" in log
    waiting = cli("run", *words, "--vllm.seed=7", "--infra.gpu_wait=2", expect=1).stderr
    told = f"starting the model server: waiting for a GPU, place 1 of 1 in the queue; GPU 0: the kept server {shown['server']}"
    assert told in waiting, "who waits sees who holds what"
    assert "Nothing to stop" in cli("stop").stderr
    assert shown["server"] in cli("stop", "-m", MODEL).stderr
    assert json.loads(cli("status", "--json").stdout) == []
    assert machine.leased() == []


def test_after_kill_9_of_everything_of_ours_stop_leaves_no_process_lease_or_gpu(cli: Cli, machine: Machine):
    """A run that generates, a kept server, and all who look after them; only the servers themselves are spared."""
    machine.set("count", "2")
    cli.env = machine.env(cli.env)
    words = ["-m", MODEL, "-b", "demo", "--infra.target=node"]
    cli("deploy", "-m", MODEL, "-b", "demo", "--infra.target=node", "--infra.engine=llamacpp", "--vllm.seed=7")
    running = cli.start("run", *words, "--run-dir", str(cli.run_dir))
    results = cli.run_dir / "results.jsonl"
    cli.wait_for(lambda: results.is_file() and results.stat().st_size > 0, running)
    assert machine.leased() == [0, 1]
    servers = {pid for pid, line in cli.mark.processes().items() if "llamacpp_server.py" in line.partition(" -- ")[0]}
    assert len(servers) == 2
    for pid in cli.mark.processes().keys() - servers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    running.communicate()
    cli("stop", "--all")
    assert cli.mark.processes() == {}
    assert list((cli.folder / "state" / "leases").glob("*.json")) == []
    assert machine.leased() == []
    assert json.loads(cli("status", "--json").stdout) == []
