"""What an app on Modal is called, and which settings are refused before Modal is asked."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from modal._utils.name_utils import check_tag_dict, is_valid_object_name

from modal_eval.checkpoints import resolve_model
from modal_eval.cli.deploy import deployable, run_command
from modal_eval.config.identity import config_identity
from modal_eval.config.load import benchmark_files, load_benchmark, resolve
from modal_eval.config.models import BenchmarkConfig, Overrides, RunConfig
from modal_eval.errors import CheckpointError, ConfigError
from modal_eval.harnesses.adapter_process import withheld
from modal_eval.records import PreparedModel
from modal_eval.serving import modal_keys, vllm
from modal_eval.serving.modal_app import app_tags, plan, tagged_price
from modal_eval.serving.prices import Price, estimate

MODEL = PreparedModel("org/m-1.7B", "hub", None, "org/m-1.7B", "c0ffee", None, None, "none", None)


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path))
    return tmp_path


def config(**sections):
    sections.setdefault("infra", {})
    given = {**sections, "infra": {"target": "modal", **sections["infra"]}}
    return resolve("org/m-1.7B", BenchmarkConfig(name="toy", env_id="toy"), Overrides.model_validate(given))


def name(model=MODEL, **sections):
    return plan(config(**sections), model).name


def test_a_name_tells_the_model_and_is_one_that_modal_takes():
    assert re.fullmatch(r"modal-eval-org-m-1\.7B-[0-9a-f]{12}", name())
    for model in ("a" * 200, "org/" + "b" * 96, "org/--..--", "ünicode/模型", "-/-"):
        made = name(replace(MODEL, model_id=model))
        assert is_valid_object_name(made)
        assert made.startswith("modal-eval-")


def test_runs_that_ask_for_the_same_server_get_the_same_name():
    asked_otherwise = {
        "sampling": {"temperature": 0.0, "max_tokens": 7}, "eval": {"rollouts": 3, "max_concurrent": 9},
        "infra": {"keep": 60, "gpu_hour_price": 2.5, "silence_timeout": 5, "outage_timeout": 5},
    }  # fmt: skip
    assert name() == name() == name(**asked_otherwise)


DIFFERENT = {
    "the context": {"vllm": {"max_model_len": 8192}},
    "the dtype": {"vllm": {"dtype": "float16"}},
    "the seed": {"vllm": {"seed": 1}},
    "another flag": {"vllm": {"extra_args": {"max_num_seqs": 8}}},
    "the GPU": {"infra": {"gpu": "H100"}},
    "replicas": {"infra": {"gpu": "A100-80GB:2"}, "vllm": {"data_parallel_size": 2}},
    "the time limit": {"infra": {"timeout": 60}},
    "the idle window": {"infra": {"scaledown_window": 60}},
    "calls at a time": {"infra": {"max_concurrent_inputs": 5}},
    "the secrets": {"infra": {"secrets": []}},
    "the lifetime": {"infra": {"lifetime": 3600}},
}


def test_no_two_server_settings_share_a_name():
    names = [name(), *(name(**sections) for sections in DIFFERENT.values())]
    models = {
        "revision": "beef", "model_id": "org/other", "chat_template_sha256": "1", "chat_template": Path("t.jinja"),
    }  # fmt: skip
    names += [name(replace(MODEL, **{field: value})) for field, value in models.items()]
    assert len(set(names)) == len(names) == 1 + len(DIFFERENT) + len(models)


def test_the_run_that_deploy_names_asks_for_the_server_that_it_deployed():
    infra = {"lifetime": 259200, "secrets": [], "gpu": "H100:2", "keep": 0}
    vllm = {
        "max_model_len": None,
        "data_parallel_size": 2,
        "enforce_eager": True,
        "extra_args": {"x": {"y": [1, "a b"]}},
    }
    given = Overrides.model_validate({"infra": infra, "vllm": vllm, "sampling": {"top_p": 0.5}})
    deployed = deployable("org/m-1.7B", "gsm8k", given)
    told = run_command(deployed, "org/m-1.7B", "gsm8k", given)
    assert told.startswith("modal-eval run -m org/m-1.7B -b gsm8k --infra.target=modal ")
    assert " --infra.lifetime=259200 " in told
    assert "keep" not in told, "it is as the benchmark's"
    typed = [sys.executable, "-m", "modal_eval.cli", *shlex.split(told)[1:], "--dry-run", "--json"]
    ran = subprocess.run(typed, capture_output=True, text=True, check=True, timeout=60)
    asked = RunConfig.model_validate(json.loads(ran.stdout))
    assert plan(asked, MODEL).name == plan(deployed, MODEL).name
    assert plan(asked, MODEL).name != plan(deployable("org/m-1.7B", "gsm8k", Overrides()), MODEL).name


def test_two_machines_never_share_a_name(tmp_path, monkeypatch):
    here = name()
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "another"))
    assert name() != here


def test_the_flags_on_modal_are_the_local_servers():
    wanted = config(vllm={"max_model_len": 8192, "dtype": "bfloat16", "extra_args": {"max_num_seqs": 8}})
    local = vllm.command(Path("python"), wanted, replace(MODEL, path=Path("/m"), chat_template=Path("/t.jinja")), 1)
    remote = list(plan(wanted, replace(MODEL, chat_template=Path("/t.jinja"))).command)
    flags = local[local.index("--served-model-name") :]
    flags[flags.index("/t.jinja")] = "/modal-eval/chat_template.jinja"
    assert remote[-len(flags) :] == flags


def test_tags_are_ones_that_modal_takes():
    tags = app_tags("org/" + "m" * 99, "host with spaces-1-ab", 1e9, Price(2, "A100-80GB"))
    check_tag_dict(tags)
    assert tags["deadline"] == "1000000000"
    assert tagged_price(tags["gpus"]) == estimate("A100-80GB", 2)


def test_a_key_is_made_once_and_private(state):
    first = modal_keys.key("modal-eval-a-1.7B-1")
    assert modal_keys.key("modal-eval-a-1.7B-1") == first
    assert modal_keys.key("modal-eval-a-1.7B-2") != first
    assert modal_keys.key_path("modal-eval-a-1.7B-1").stat().st_mode & 0o077 == 0
    assert [path.name for path in (state / "modal").iterdir() if not path.name.endswith(".key")] == []


def test_a_key_goes_to_the_proxy_by_its_variables_name_and_to_no_harness(monkeypatch):
    variable = modal_keys.key_variable("modal-eval-a")
    monkeypatch.delenv(variable)  # set by the line above, and to be gone after the test
    assert re.fullmatch(r"MODAL_EVAL_KEY_[0-9A-F]{12}", variable)
    assert withheld(variable)


REFUSED = {
    "llama.cpp": ({"infra": {"engine": "llamacpp"}}, "infra.engine=llamacpp does not run on Modal"),
    "too few GPUs": ({"vllm": {"data_parallel_size": 2}}, "write --infra.gpu=A100-80GB:2"),
    "idle GPUs": ({"infra": {"gpu": "H100:4"}}, "write --infra.gpu=H100:1"),
    "no GPU": ({"infra": {"gpu": ":2"}}, "infra.gpu=:2 is no GPU of Modal"),
    "half a GPU": ({"infra": {"gpu": "H100:0.5"}}, "is no GPU of Modal"),
    "an environment": ({"infra": {"environment": "/opt/vllm"}}, "the server would be on Modal"),
    "no room": ({"vllm": {"max_model_len": 100}, "sampling": {"max_tokens": 100}}, "leaves no room for a prompt"),
    "a URL": ({"infra": {"base_url": "http://h/v1"}}, "infra.target is 'modal'"),
}


def test_auto_has_to_fit_on_modal_too_and_each_place_gets_what_it_takes():
    given = {
        "infra": {"target": "auto", "gpu": "H100:4", "environment": "/opt/vllm"},
        "vllm": {"data_parallel_size": "auto"},
    }
    auto = config(**given)
    there = auto.on("modal")
    assert (there.infra.target, there.infra.environment, there.vllm.data_parallel_size) == ("modal", None, 4)
    here = auto.on("node")
    assert (here.infra.target, here.infra.environment, here.vllm.data_parallel_size) == ("node", "/opt/vllm", "auto")
    for refused, way_out in (
        ({"engine": "llamacpp"}, "does not run on Modal"),
        ({"gpu": "H100:2"}, "write --infra.gpu"),
    ):
        with pytest.raises(ConfigError, match=way_out):
            config(infra={"target": "auto", **refused})


@pytest.mark.parametrize("what", REFUSED)
def test_a_setting_that_modal_cannot_have_is_refused_with_the_way_out(what):
    sections, way_out = REFUSED[what]
    with pytest.raises(ConfigError) as refused:
        config(**sections)
    assert way_out in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_endpoint_cannot_be_kept():
    asked = {"infra": {"keep": 60, "target": "endpoint", "base_url": "http://127.0.0.1:9/v1"}}
    with pytest.raises(ConfigError, match="infra.keep=60 is for servers that a run starts"):
        resolve("m", BenchmarkConfig(env_id="toy"), Overrides.model_validate(asked))


@pytest.mark.parametrize("given", [[], "[]", "", ["[]"], [[]]])
def test_no_secret_can_be_asked_for_on_the_command_line(given):
    assert config(infra={"secrets": given}).infra.secrets == []
    assert config(infra={"secrets": "a, b"}).infra.secrets == ["a", "b"]


@pytest.mark.parametrize("model", ["./checkpoints/none", "/models/m", "SmolLM2-135M-Instruct", "m.gguf"])
def test_what_no_server_on_modal_can_load_is_refused_in_one_line(model):
    wanted = config().model_copy(update={"model": model})
    with pytest.raises(CheckpointError, match="is no model for a server on Modal") as refused:
        resolve_model(wanted)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("benchmark", sorted(benchmark_files()))
def test_every_benchmark_can_be_served_on_modal(benchmark):
    given = {"infra": {"target": "modal", "engine": "vllm"}, "vllm": {"allow_tensor_parallel": True}}
    wanted = resolve("org/m", load_benchmark(benchmark), Overrides.model_validate(given))
    command = plan(wanted, MODEL).command
    assert command[:3] == ("vllm", "serve", "org/m-1.7B")
    assert "server" in config_identity(wanted)
