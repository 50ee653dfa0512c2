"""Real llama.cpp servers of SmolLM2-135M-Instruct, and everything that can go wrong while one starts."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import httpx
import psutil
import pytest

from modal_eval import serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.environments import ensure_environment
from modal_eval.errors import CheckpointError, ConfigError, ServerError
from modal_eval.processes import is_alive, start_ticks
from modal_eval.serving import llamacpp
from modal_eval.serving.leases import lease_path, take_lease, write_lease
from tests.support.processes import until

MODEL = "SmolLM2-135M-Instruct"


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "run"


def config(model=MODEL, **infra):
    benchmark = BenchmarkConfig(name="toy", env_id="toy", eval={"max_concurrent": 2})
    return resolve(model, benchmark, Overrides(infra={"engine": "llamacpp", **infra}))


def start(run_dir, **infra):
    wanted = config(**infra)
    return serving.start_server(wanted, resolve_model(wanted), run_dir)


def test_a_real_server_answers_and_is_gone_after_the_stop(state):
    handle = start(state)
    (lease,) = serving.leases()
    try:
        assert serving.server_exit(handle) is None
        assert is_alive(lease.server_pid, lease.server_started)
        asked = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 8,
            "temperature": 0,
        }
        answer = httpx.post(f"{handle.base_urls[0]}/chat/completions", json=asked, timeout=60).json()
        assert answer["choices"][0]["message"]["content"]
        assert handle.facts["chat_template_sha256"] == resolve_model(config()).chat_template_sha256
    finally:
        serving.stop_server(handle)
    serving.stop_server(handle)
    assert not is_alive(lease.server_pid, lease.server_started)
    assert serving.leases() == []


def children():
    """Processes below this one; a server that the session's tests share may be among them."""
    return set(psutil.Process().children(recursive=True))


def unknown_architecture(path):
    """A GGUF file that is whole, and that no version of llama.cpp can load."""
    key, value = b"general.architecture", b"no-such-architecture"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    path.write_bytes(head + struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value)
    return path


def test_a_server_that_dies_while_loading_is_reported_at_once_with_its_last_words(state, tmp_path):
    wanted = config(str(unknown_architecture(tmp_path / "odd.gguf"))).model_copy(update={"chat_template": "base"})
    before = children()
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"exited with 1; the end of .*llamacpp.log(.|\n)*llama.cpp does not start"):
        serving.start_server(wanted, resolve_model(wanted), state)
    assert time.monotonic() - began < 60
    assert serving.leases() == []
    assert children() == before


def silent_engine(tmp_path):
    """An environment whose Python starts and then never answers."""
    python = tmp_path / "silent" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho loading weights >&2\nexec sleep 600\n")
    python.chmod(0o755)
    return str(python.parent.parent)


def test_a_start_beyond_its_limit_gives_one_error_and_leaves_no_process(state, tmp_path):
    model = resolve_model(config())
    wanted = config(environment=silent_engine(tmp_path), startup_timeout=1)
    before = children()
    with pytest.raises(ServerError, match=r"did not answer within infra.startup_timeout=1 s(.|\n)*loading weights"):
        serving.start_server(wanted, model, state)
    assert serving.leases() == []
    assert children() == before


def test_a_port_that_was_taken_in_the_meantime_is_said_by_the_server(state):
    with open_port() as port:
        command = llamacpp.command(ensure_environment("llamacpp"), config(), resolve_model(config()), port)
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1
    assert "llama.cpp does not start" in ran.stderr


@contextlib.contextmanager
def open_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held.getsockname()[1]


def test_a_folder_without_a_config_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(CheckpointError, match=r"is incomplete: it lacks config.json"):
        resolve_model(config(str(tmp_path), engine="vllm"))


def test_a_model_that_is_nowhere_names_what_can_be_given():
    with pytest.raises(CheckpointError, match="'org/nothing' is none on this disk"):
        resolve_model(config("org/nothing"))


def test_kill_9_of_the_holder_leaves_no_server_and_the_next_start_drops_its_lease(state):
    script = textwrap.dedent(f"""
        import sys, pathlib
        from modal_eval import serving
        from modal_eval.checkpoints import resolve_model
        from modal_eval.config.load import resolve
        from modal_eval.config.models import BenchmarkConfig, Overrides
        wanted = resolve({MODEL!r}, BenchmarkConfig(name="t", env_id="t"), Overrides(infra={{"engine": "llamacpp"}}))
        serving.start_server(wanted, resolve_model(wanted), pathlib.Path({str(state)!r}))
        print("ready", flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "ready\n"
        (lease,) = serving.leases()
        assert serving.holder_alive(lease)
        holder.kill()
    until(lambda: not is_alive(lease.server_pid, lease.server_started))
    assert not serving.holder_alive(lease)
    assert [deed.outcome for deed in serving.clean().deeds] == ["stopped"]
    assert serving.leases() == []


def test_a_lease_ends_a_server_from_another_process(state):
    handle = start(state)
    try:
        (lease,) = serving.leases()
        subprocess.run(
            [
                sys.executable,
                "-c",
                "from modal_eval import serving; [serving.stop_lease(one) for one in serving.leases()]",
            ],
            check=True,
        )
        assert not is_alive(lease.server_pid, lease.server_started)
        until(lambda: serving.server_exit(handle) is not None)
        assert "killed by signal 15" in serving.server_exit(handle)
    finally:
        serving.stop_server(handle)


def test_a_handle_ends_every_replica_from_another_process(state):
    wanted = config()
    wanted = wanted.model_copy(update={"vllm": wanted.vllm.model_copy(update={"data_parallel_size": 2})})
    handle = serving.start_server(wanted, resolve_model(wanted), state)
    script = """if True:
        import sys
        from modal_eval import serving
        from modal_eval.records import ServerHandle
        handle = ServerHandle.from_json(sys.argv[1])
        assert serving.server_exit(handle) is None
        serving.stop_server(handle)
        """
    try:
        assert len(set(handle.base_urls)) == 2
        running = serving.leases()
        assert sorted(one.lease_id for one in running) == [handle.lease_id, f"{handle.lease_id}-1"]
        subprocess.run([sys.executable, "-c", script, handle.to_json()], check=True)
        assert not any(is_alive(one.server_pid, one.server_started) for one in running)
        assert serving.leases() == []
    finally:
        serving.stop_server(handle)


def test_the_benchmarks_template_is_used_for_a_file_that_brings_none(state, tmp_path):
    packaged = resolve_model(config())
    template = tmp_path / "shout.jinja"
    template.write_text("{% for message in messages %}SHOUT {{ message['content'] }}{% endfor %}")
    handle = serving.start_server(config(), replace(packaged, chat_template=template), state)
    try:
        assert handle.facts["chat_template_sha256"] == hashlib.sha256(template.read_bytes()).hexdigest()
        assert packaged.chat_template_sha256 != handle.facts["chat_template_sha256"]
    finally:
        serving.stop_server(handle)


def test_a_lease_of_another_host_is_neither_swept_nor_stopped_from_here(tmp_path):
    lease = replace(take_lease(tmp_path, MODEL, "b2"), host="another-host", holder_pid=0)
    write_lease(lease)
    assert serving.clean().deeds == []
    assert serving.leases() == [lease]
    with pytest.raises(ServerError, match="runs on another-host; run `modal-eval stop` there"):
        serving.stop_lease(lease)


def test_a_lease_whose_pid_went_to_another_process_stops_nobody(tmp_path):
    lease = take_lease(tmp_path, MODEL, "a1")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as innocent:
        write_lease(replace(lease, server_pid=innocent.pid, server_started=start_ticks(innocent.pid) - 5))
        for one in serving.leases():
            serving.stop_lease(one)
        assert innocent.poll() is None
        os.kill(innocent.pid, signal.SIGKILL)


def test_an_endpoint_that_is_not_there_is_said_in_one_line(state):
    with open_port() as port:
        pass
    wanted = config(base_url=f"http://127.0.0.1:{port}/v1")
    with pytest.raises(ServerError, match=f"127.0.0.1:{port}/v1 does not answer"):
        serving.start_server(wanted, resolve_model(wanted), state)


def test_an_endpoint_that_serves_another_model_names_what_it_serves(state):
    handle = start(state)
    try:
        wanted = config("SmolLM2", base_url=handle.base_urls[0])
        with pytest.raises(ConfigError, match=f"does not serve 'SmolLM2' but {MODEL}"):
            serving.start_server(wanted, resolve_model(wanted), state)
    finally:
        serving.stop_server(handle)


def test_a_key_that_is_not_in_the_environment_is_asked_for_by_name(state):
    wanted = config(base_url="http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="infra.api_key_env=NO_SUCH_KEY, but that environment variable is not set"):
        serving.start_server(wanted, resolve_model(wanted), state)


def test_a_lease_is_on_disk_as_plain_json(tmp_path):
    lease = take_lease(tmp_path, MODEL, "a1")
    assert json.loads(lease_path(lease).read_text())["run_dir"] == str(tmp_path)
