import json
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modal_eval import serving
from modal_eval.checkpoints import resolve_model
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.errors import ConfigError, GpuError, ServerError
from modal_eval.records import PreparedModel
from modal_eval.serving import keeping, llamacpp, node, vllm

PYTHON = Path("/env/bin/python")
MODEL = PreparedModel("m", "folder", Path("/models/m"), "m", None, None, Path("/t.jinja"), "benchmark", None)


def config(model="m", infra=None, **settings):
    return resolve(model, BenchmarkConfig(name="toy", env_id="toy"), Overrides(infra=infra or {}, vllm=settings))


def words_of(**settings):
    return " ".join(vllm.command(PYTHON, config(**settings), MODEL, 1234))


def test_every_vllm_setting_becomes_vllms_own_flag():
    words = words_of(max_model_len=8192, dtype="bfloat16", quantization="awq", enforce_eager=True, prefix_caching=False)
    for flag in (
        "serve /models/m --host 127.0.0.1 --port 1234 --served-model-name m",
        "--max-model-len 8192",
        "--dtype bfloat16",
        "--quantization awq",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        "--chat-template /t.jinja",
    ):
        assert flag in words
    assert "trust-remote-code" not in words


def test_extra_arguments_are_passed_on_in_vllms_spelling():
    extra = {
        "max_num_seqs": 64,
        "async-scheduling": False,
        "middleware": ["a", "b"],
        "hf_overrides": {"x": 1},
        "y": None,
    }
    words = words_of(extra_args=extra)
    assert words.endswith('--max-num-seqs 64 --no-async-scheduling --middleware a b --hf-overrides {"x": 1}')


@pytest.mark.parametrize("name", sorted(vllm.OURS))
def test_an_extra_argument_that_is_ours_to_set_is_refused(name):
    with pytest.raises(ConfigError, match=f"vllm.extra_args.{name}: "):
        words_of(extra_args={name.replace("_", "-"): 1})


def test_an_extra_argument_that_has_a_key_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="vllm.extra_args.dtype has a key of its own; write vllm.dtype"):
        words_of(extra_args={"dtype": "float16"})


def test_llamacpp_refuses_an_argument_that_it_would_leave_out():
    with pytest.raises(
        ConfigError, match=r"vllm.extra_args.max_num_seqs is vLLM's; llama.cpp takes slots, threads here"
    ):
        llamacpp.command(PYTHON, config(extra_args={"max_num_seqs": 1}), MODEL, 1)


def test_each_replica_has_gpus_of_its_own():
    two = config(data_parallel_size=2, tensor_parallel_size=2)
    assert [vllm.devices(two, number, None) for number in range(2)] == [["0", "1"], ["2", "3"]]
    assert [vllm.devices(two, number, "7,5,3,1") for number in range(2)] == [["7", "5"], ["3", "1"]]
    with pytest.raises(ConfigError, match=r"needs 4 GPUs, and CUDA_VISIBLE_DEVICES=0,1 names 2"):
        vllm.devices(two, 0, "0,1")


def test_on_a_node_fewer_visible_gpus_than_replicas_are_what_the_lease_takes(this_machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    here = {"target": "node", "gpu_wait": 0}
    two, wide = (config(infra=here, data_parallel_size=2, tensor_parallel_size=size) for size in (1, 2))
    assert vllm.variables(PYTHON, two, 1)["CUDA_VISIBLE_DEVICES"] == "3"
    (lease,) = node.lease_gpus(two, MODEL, "a run", say=print)
    assert lease is not None
    with lease:
        assert lease.variables["CUDA_VISIBLE_DEVICES"] == "3"
    with pytest.raises(GpuError, match=r"2 GPUs are wanted, and this process may use 1 .* with CUDA_VISIBLE_DEVICES=3"):
        node.lease_gpus(wide, MODEL, "a run", say=print)
    with pytest.raises(ConfigError, match="needs 2 GPUs, and CUDA_VISIBLE_DEVICES=3 names 1"):
        vllm.variables(PYTHON, config(data_parallel_size=2), 0)


def test_a_kept_servers_name_says_which_gpus_it_is_limited_to_and_not_which_it_got(monkeypatch):
    asked = config(infra={"target": "node", "environment": sys.executable}, data_parallel_size=2)

    def name(visible):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return keeping.name_of(asked, MODEL, say=print)

    assert name("3") == name("3")
    assert len({name("3"), name("0"), name("0,1")}) == 3


def test_equal_kept_servers_of_two_nodes_with_one_home_folder_have_two_names(monkeypatch):
    asked = config(infra={"target": "node", "environment": sys.executable})
    here = keeping.name_of(asked, MODEL, say=print)
    monkeypatch.setattr(socket, "gethostname", lambda: "another-node")
    there = keeping.name_of(asked, MODEL, say=print)
    assert there != here
    assert keeping.folder_of(there) != keeping.folder_of(here)


def test_no_key_of_ours_goes_to_the_server(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "k")
    monkeypatch.setenv("HF_TOKEN", "t")
    assert not {"VLLM_API_KEY", "HF_TOKEN"} & vllm.variables(PYTHON, config(), 0).keys()
    assert "HF_TOKEN" not in llamacpp.variables(PYTHON, config(), 0)


@pytest.fixture
def gateway():
    """An endpoint that answers `/v1/models` with the given statuses, then with its models to whoever has the key."""
    statuses = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers["Authorization"] == "Bearer right"
            status = statuses.pop(0) if statuses else 200 if allowed else 401
            content = json.dumps({"data": [{"id": "m", "max_model_len": 8, "root": "org/m"}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", statuses
        server.shutdown()
        thread.join()


def ask(url, tmp_path, monkeypatch, key="right", **infra):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("THE_KEY", key)
    wanted = config(infra={"base_url": url, "api_key_env": "THE_KEY", **infra})
    return serving.start_server(wanted, resolve_model(wanted), tmp_path)


def test_an_endpoint_tells_its_facts_and_keeps_its_key_in_a_variable(gateway, tmp_path, monkeypatch):
    url, _ = gateway
    handle = ask(f"{url}, {url}/", tmp_path, monkeypatch)
    assert handle.base_urls == (url, url)
    assert (handle.facts["max_model_len"], handle.facts["model_root"]) == (8, "org/m")
    assert "right" not in handle.to_json()
    assert serving.leases() == []
    serving.stop_server(handle)
    assert serving.server_exit(handle) is None


def test_an_endpoint_that_is_still_loading_is_waited_for(gateway, tmp_path, monkeypatch):
    url, statuses = gateway
    statuses += [503, 502]
    assert ask(url, tmp_path, monkeypatch).model == "m"


def test_an_endpoint_that_stays_loading_is_given_up_at_its_limit(gateway, tmp_path, monkeypatch):
    url, statuses = gateway
    statuses += [503] * 100
    with pytest.raises(ServerError, match="answers 503, and infra.startup_timeout is over"):
        ask(url, tmp_path, monkeypatch, startup_timeout=1)


def test_an_endpoint_that_refuses_the_key_asks_for_the_variables_name(gateway, tmp_path, monkeypatch):
    with pytest.raises(ServerError, match=r"refuses us \(401\); name the variable that holds its key"):
        ask(gateway[0], tmp_path, monkeypatch, key="wrong")
