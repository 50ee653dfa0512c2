"""Real vLLM on the CPU: `make test-vllm`."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import psutil
import pytest

from modal_eval import serving
from modal_eval.checkpoints import resolve_model
from modal_eval.checkpoints.weights import INDEX, SINGLE, SINGLE_SHARD, tensors_in
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.errors import ServerError
from modal_eval.processes import is_alive
from tests.support.processes import until
from tests.support.vllm_cpu import ENVIRONMENT, MODEL, converted_model, marks

pytestmark = marks


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return converted_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_API_KEY", "would lock us out")
    return tmp_path / "run"


def config(folder, **vllm):
    vllm = {"max_model_len": 1024, "dtype": "float32", "enforce_eager": True, **vllm}
    overrides = Overrides(infra={"environment": str(ENVIRONMENT), "startup_timeout": 600}, vllm=vllm)
    return resolve(str(folder), BenchmarkConfig(name="toy", env_id="toy", sampling={"max_tokens": 256}), overrides)


def descendants(pid):
    return psutil.Process(pid).children(recursive=True)


def all_gone(processes, within=30.0):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
            return True
        time.sleep(0.1)
    return False


def test_vllm_answers_and_kill_9_of_its_main_process_leaves_no_orphan(model_folder, run_dir):
    wanted = config(model_folder)
    handle = serving.start_server(wanted, resolve_model(wanted), run_dir)
    try:
        asked = {
            "model": f"{MODEL}_step40",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 16,
            "temperature": 0,
        }
        answer = httpx.post(f"{handle.base_urls[0]}/chat/completions", json=asked, timeout=300).json()
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert handle.facts["max_model_len"] == 1024
        assert handle.facts["version"].startswith("0.32.0")
        assert "model_root" not in handle.facts
        (lease,) = serving.leases()
        tree = descendants(lease.server_pid)
        assert tree, "vLLM has its engine in a process of its own"
        os.kill(lease.server_pid, signal.SIGKILL)
        assert all_gone(tree)
        until(lambda: serving.server_exit(handle))  # its guardian tells how it ended once it has buried it
        assert "was killed by signal 9" in serving.server_exit(handle)
    finally:
        serving.stop_server(handle)
    assert serving.leases() == []


def test_a_kept_vllm_is_used_by_the_next_run_and_all_of_it_is_gone_after_the_stop(model_folder, run_dir):
    asked = config(model_folder)
    kept = asked.model_copy(update={"infra": asked.infra.model_copy(update={"keep": 600})})
    first = serving.start_server(kept, resolve_model(kept), run_dir)
    serving.stop_server(first)
    second = serving.start_server(asked, resolve_model(asked), run_dir)
    assert second.base_urls == first.base_urls
    assert httpx.get(f"{second.base_urls[0]}/models", timeout=60).status_code == 200
    (server,) = serving.servers()
    (keeper,) = {one.holder_pid for one in server.processes}
    tree = [psutil.Process(keeper), *descendants(keeper)]
    assert len(tree) >= 4, "keeper, guardian, vLLM, and its engine"
    serving.stop_server(second)
    assert [deed.outcome for deed in serving.stop_all(serving.servers()).deeds] == ["stopped"]
    assert all_gone(tree)
    assert serving.leases() == []


def test_kill_9_of_the_holder_while_vllm_loads_leaves_nothing_of_it(model_folder, run_dir):
    script = f"""if True:
        import pathlib, sys
        from modal_eval import serving
        from modal_eval.checkpoints import resolve_model
        from modal_eval.config.models import RunConfig
        wanted = RunConfig.model_validate_json({config(model_folder).model_dump_json()!r})
        serving.start_server(wanted, resolve_model(wanted), pathlib.Path({str(run_dir)!r}), say=lambda line: print(line, flush=True))
        """
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().startswith("vllm is starting")
        (lease,) = serving.leases()
        deadline = time.monotonic() + 300
        while not (tree := descendants(lease.server_pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert tree
        holder.kill()
    assert all_gone(tree)
    assert not is_alive(lease.server_pid, lease.server_started)
    assert [deed.outcome for deed in serving.clean().deeds] == ["stopped"]


def test_a_flag_that_vllm_does_not_know_is_told_in_its_own_words(model_folder, run_dir):
    wanted = config(model_folder, extra_args={"no_such_flag": 1})
    with pytest.raises(ServerError, match=r"exited with 2; the end of .*vllm.log(.|\n)*no-such-flag"):
        serving.start_server(wanted, resolve_model(wanted), run_dir)
    assert serving.leases() == []


def test_an_index_that_names_another_file_stops_vllm_and_our_repair_lets_it_answer(
    model_folder, run_dir, tmp_path, monkeypatch
):
    monkeypatch.setenv("MODAL_EVAL_CACHE_DIR", str(tmp_path / "cache"))
    quirk = tmp_path / "quirk_step40"
    shutil.copytree(model_folder, quirk)
    weights = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors_in(quirk / SINGLE), SINGLE_SHARD)})
    (quirk / INDEX).write_text(weights)
    wanted = config(quirk)
    prepared = resolve_model(wanted)
    assert prepared.path != quirk
    with pytest.raises(ServerError, match="exited with"):
        serving.start_server(wanted, dataclasses.replace(prepared, path=quirk), run_dir)
    handle = serving.start_server(wanted, prepared, run_dir)
    try:
        asked = {"model": "quirk_step40", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{handle.base_urls[0]}/completions", json=asked, timeout=300).json()
        assert "Paris" in answer["choices"][0]["text"]
    finally:
        serving.stop_server(handle)
    assert (quirk / INDEX).read_text() == weights
