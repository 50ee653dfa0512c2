"""Servers on a node: real llama.cpp replicas on leased GPUs, of which only the driver is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from modal_eval import gpus, serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.load import load_benchmark, resolve
from modal_eval.config.models import Overrides
from modal_eval.errors import GpuError, ServerError
from modal_eval.processes import is_alive
from modal_eval.results.run_folder import Run
from modal_eval.stages.serving import deploy, teardown
from tests.support.cli import finished
from tests.support.processes import until

MODEL = "SmolLM2-135M-Instruct"
WAIT_S = 5.0
LEASES_COUNT_IN_S = 1.0


@pytest.fixture
def here(machine, monkeypatch, tmp_path):
    """The stand-in machine, seen from this process, with a state folder of the test's own."""
    machine.enter(monkeypatch)
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    return machine


def config(**vllm):
    infra = {"target": "node", "gpu_wait": 0}
    return resolve(MODEL, load_benchmark("demo"), Overrides.model_validate({"infra": infra, "vllm": vllm}))


def start(wanted, folder):
    return serving.start_server(wanted, resolve_model(wanted), folder)


def test_auto_takes_every_free_gpu_one_a_replica_and_gives_them_all_back(here, tmp_path):
    here.set("count", "3")
    handle = start(config(data_parallel_size="auto"), tmp_path)
    try:
        assert len(set(handle.base_urls)) == 3
        assert here.leased() == [0, 1, 2]
        environments = [
            dict(
                entry.split("=", 1)
                for entry in Path(f"/proc/{lease.server_pid}/environ").read_text().split("\0")
                if "=" in entry
            )
            for lease in serving.leases()
        ]
        assert sorted(one["CUDA_VISIBLE_DEVICES"] for one in environments) == ["0", "1", "2"]
    finally:
        serving.stop_server(handle)
    assert here.leased() == []
    assert serving.leases() == []


def test_fewer_replicas_than_asked_for_start_when_fewer_gpus_are_free_and_none_where_none_is(here, tmp_path):
    here.set("count", "2")
    first = start(config(), tmp_path)
    try:
        second = start(config(data_parallel_size=3), tmp_path)
        try:
            assert len(second.base_urls) == 1
            with pytest.raises(GpuError, match="no GPU after 0 s"):
                start(config(), tmp_path)
        finally:
            serving.stop_server(second)
    finally:
        serving.stop_server(first)
    assert here.leased() == []


def test_a_replica_that_dies_is_started_again_so_often_and_no_more(here, tmp_path):
    wanted = config()
    wanted = wanted.model_copy(update={"infra": wanted.infra.model_copy(update={"max_restarts": 1})})
    handle = start(wanted, tmp_path)
    try:
        (before,) = serving.leases()
        os.kill(before.server_pid, signal.SIGKILL)
        until(lambda: not is_alive(before.server_pid, before.server_started))
        until(lambda: serving.server_exit(handle) is None and serving.leases()[0].server_pid != before.server_pid)
        (after,) = serving.leases()
        assert after.url == before.url
        assert here.leased() == [0]
        os.kill(after.server_pid, signal.SIGKILL)
        until(lambda: "killed by signal 9" in (serving.server_exit(handle) or ""))
    finally:
        serving.stop_server(handle)
    assert here.leased() == []


def test_a_run_that_loses_one_of_three_replicas_finishes_with_every_rollout_and_none_twice(cli, machine):
    cli.env = machine.env(cli.env)
    process = cli.start(
        "run", "-m", MODEL, "-b", "demo", "--run-dir", str(cli.run_dir), "--infra.target=node", "--vllm.data_parallel_size=3",
        "--eval.num_examples=60", "--sampling.max_tokens=40", "--sampling.temperature=0.5", "--sampling.seed=1",
    )  # fmt: skip
    results = cli.run_dir / "results.jsonl"
    cli.wait_for(lambda: results.is_file() and results.read_bytes().count(b"\n") > 5, process)
    assert machine.leased() == [0, 1, 2]
    leases = [json.loads(path.read_text()) for path in (cli.folder / "state" / "leases").glob("*-1.json")]
    os.kill(leases[0]["server_pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    summary = cli.metadata()
    assert (summary["num_scored"], summary["num_unscored"]) == (60, 0)
    finished = Counter(
        line["tag"]
        for line in map(json.loads, (cli.run_dir / "checkpoint.jsonl").read_text().splitlines())
        if line.get("status") == 200
    )
    assert len(finished) == 60
    assert set(finished.values()) == {1}
    assert "it is started again" in (cli.run_dir / "logs" / "flow.log").read_text()
    assert machine.leased() == []


def test_a_gpu_stays_leased_no_longer_than_its_server_when_everything_of_ours_is_killed(cli, machine):
    cli.env = machine.env(cli.env)
    process = cli.start("run", "-m", MODEL, "-b", "demo", "--run-dir", str(cli.run_dir), "--infra.target=node")
    results = cli.run_dir / "results.jsonl"
    cli.wait_for(lambda: results.is_file() and results.stat().st_size > 0, process)
    assert machine.leased() == [0]
    process.kill()
    process.communicate()
    until(lambda: machine.leased() == [])
    cli("stop", "--all")
    assert list((cli.folder / "state" / "leases").glob("*.json")) == []


def test_a_run_pays_for_the_gpu_that_it_got_and_not_for_waiting_or_for_those_it_asked_for(cli, machine, monkeypatch):
    machine.set("count", "1")
    machine.enter(monkeypatch)
    cli.env = machine.env(cli.env)
    with gpus.take(run="another run", folder=machine.leases):
        process = cli.start(
            "run", "-m", MODEL, "-b", "demo", "--run-dir", str(cli.run_dir), "--infra.target=node",
            "--infra.gpu_hour_price=3600", "--vllm.data_parallel_size=4", "--eval.num_examples=2", "--sampling.max_tokens=8",
        )  # fmt: skip
        cli.wait_for(lambda: machine.waiting() > 0, process)
        began = time.monotonic()
        cli.wait_for(lambda: time.monotonic() - began > WAIT_S, process)
        waited = time.monotonic() - began
    finished(process, 0)
    summary = cli.metadata()
    seconds = summary["stage_seconds"]
    assert seconds["deploy"] > waited
    assert 0 < summary["gpu_seconds"] < seconds["deploy"] + seconds["generate"] - waited + LEASES_COUNT_IN_S + 1
    assert summary["cost"] == pytest.approx(summary["gpu_seconds"], abs=0.1)
    (held,) = json.loads((cli.run_dir / "run_config.json").read_text())["held"]
    assert held["gpus"] == 1


def test_a_server_that_does_not_come_up_is_paid_for_too(here, tmp_path):
    run = Run.create(config(extra_args={"slots": "many"}), tmp_path / "run")
    facts = {"model": json.loads(resolve_model(run.config).to_json()), "total_examples": 1}
    (run.run_dir / "prepared.json").write_text(json.dumps(facts))
    with pytest.raises(ServerError):
        deploy(run.run_dir)
    teardown(run.run_dir)
    (held,) = json.loads((run.run_dir / "run_config.json").read_text())["held"]
    assert (held["gpus"], held["generated_s"]) == (1, 0.0)
    assert held["starting_s"] > 0


def test_without_a_gpu_vllm_is_told_so_in_one_line_and_nothing_is_left(cli, machine):
    machine.set("count", "0")
    cli.env = machine.env(cli.env)
    ended = cli(
        "run", "-m", MODEL, "-b", "demo", "--infra.target=node", "--infra.engine=vllm", expect=1
    )  # fmt: skip
    assert "no NVIDIA GPU" in ended.stderr or "GGUF" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_server_that_cannot_start_leaves_no_gpu_leased(here, tmp_path):
    wanted = config(extra_args={"slots": "many"})
    with pytest.raises(ServerError):
        start(wanted, tmp_path)
    assert here.leased() == []
    assert serving.leases() == []
