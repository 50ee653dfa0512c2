import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from modal_eval import paths
from modal_eval.checkpoints import resolve_model
from modal_eval.checkpoints.resolve import loadable_files, step_and_stage
from modal_eval.checkpoints.templates import folder_template
from modal_eval.checkpoints.weights import INDEX, SINGLE
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides
from modal_eval.errors import CheckpointError, IncompleteError

COMMIT = "a" * 40


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MODAL_EVAL_CACHE_DIR", str(tmp_path / "cache"))


def config(model, chat_template=None, **infra):
    benchmark = BenchmarkConfig(name="toy", env_id="toy", chat_template=chat_template)
    return resolve(str(model), benchmark, Overrides(infra=infra))


def shard(values=b"\0" * 8, size=None):
    """The bytes of a safetensors file with one tensor."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, size or len(values)]}}).encode()
    return struct.pack("<Q", len(header)) + header + values


def folder(path, weights=None, **files):
    path.mkdir(parents=True)
    texts = {"config.json": "{}", "tokenizer.json": "{}", "tokenizer_config.json": '{"chat_template": "T"}', **files}
    for name, text in texts.items():
        (path / name).write_text(text)
    for name, content in (weights or {SINGLE: shard()}).items():
        (path / name).write_bytes(content)
    return path


def gguf(path, metadata=None, tail=b"\0" * 64, offset=0):
    """A GGUF file with one tensor, whose texts are `metadata`."""
    text = lambda value: struct.pack("<Q", len(value)) + value.encode()  # noqa: E731
    pairs = {"general.architecture": "llama", **(metadata or {})}
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs) + 1)
    for key, value in pairs.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    head += text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    head += text("w") + struct.pack("<IQIQ", 1, 2, 0, offset)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + tail)
    return path


def test_a_whole_folder_is_ready_under_its_last_name_alone(tmp_path):
    prepared = resolve_model(config(folder(tmp_path / "math_run_step40")))
    assert (prepared.source, prepared.served_name, prepared.step) == ("folder", "math_run_step40", 40)
    assert prepared.path == tmp_path / "math_run_step40"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": "{"}, "config.json is broken"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is broken"),
        ({INDEX: "{}"}, f"{INDEX} is broken"),
    ],
)
def test_a_broken_json_file_is_named(tmp_path, files, words):
    with pytest.raises(CheckpointError, match=words):
        resolve_model(config(folder(tmp_path / "model", **files)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    path = folder(tmp_path / "model")
    (path / "tokenizer.json").unlink()
    (path / "tokenizer_config.json").unlink()
    with pytest.raises(IncompleteError, match="is incomplete: it lacks a tokenizer"):
        resolve_model(config(path))


def test_a_missing_shard_is_named(tmp_path):
    path = folder(tmp_path / "model", {"model-00001-of-00002.safetensors": shard()})
    (path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=rf"lacks model-00002-of-00002.safetensors, named by {INDEX}"):
        resolve_model(config(path))


def test_a_shard_that_was_cut_off_is_named_with_both_sizes(tmp_path):
    cut = shard(b"\0" * 8, size=800)
    with pytest.raises(CheckpointError, match=rf"{SINGLE} is {len(cut)} bytes and should be {len(cut) + 792}"):
        resolve_model(config(folder(tmp_path / "model", {SINGLE: cut})))


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, struct.pack("<Q", 2) + b"[]"])
def test_a_shard_that_is_none_is_named(tmp_path, content):
    with pytest.raises(CheckpointError, match=f"{SINGLE} has a broken header"):
        resolve_model(config(folder(tmp_path / "model", {SINGLE: content})))


def test_the_digest_follows_the_weights_and_not_the_clock(tmp_path):
    one = folder(tmp_path / "one")
    first = resolve_model(config(one)).digest
    os.utime(one / SINGLE, (1, 1))
    assert resolve_model(config(one)).digest == first
    assert resolve_model(config(folder(tmp_path / "two"))).digest == first
    (one / SINGLE).write_bytes(shard(b"\1" * 8))
    assert resolve_model(config(one)).digest != first


NUMBERED_BIN = "pytorch_model-00001-of-00001.bin"


def test_the_digest_follows_pytorch_weights_where_they_are_what_is_loaded(tmp_path):
    large = bytes(1 << 20)
    one = folder(tmp_path / "one", {NUMBERED_BIN: large})
    first = resolve_model(config(one)).digest
    assert resolve_model(config(folder(tmp_path / "two", {NUMBERED_BIN: large}))).digest == first
    (one / NUMBERED_BIN).write_bytes(b"\1" * len(large))
    assert resolve_model(config(one)).digest != first
    assert NUMBERED_BIN in {file.name for file in loadable_files(one)}
    (one / SINGLE).write_bytes(shard())
    assert NUMBERED_BIN not in {file.name for file in loadable_files(one)}


def test_what_is_written_deeper_in_a_folder_or_beside_its_model_leaves_the_digest_and_the_upload_alone(tmp_path):
    path = folder(tmp_path / "run_step40")
    before = (resolve_model(config(path)).digest, loadable_files(path))
    folder(path / "checkpoint-500")
    (path / "evals").mkdir()
    (path / "evals" / "gsm8k.json").write_text("{}")
    (path / "optimizer.bin").write_bytes(b"large")
    assert (resolve_model(config(path)).digest, loadable_files(path)) == before


def test_the_models_own_template_comes_first_and_the_benchmarks_last(tmp_path):
    held = json.dumps({"chat_template": "A"})
    both = folder_template(
        folder(tmp_path / "both", **{"tokenizer_config.json": held, "chat_template.jinja": "B"}), "math"
    )
    assert (both.source, both.path.read_text()) == ("tokenizer_config.json", "A")
    config_only = folder_template(folder(tmp_path / "config", **{"tokenizer_config.json": held}), "math")
    assert (config_only.path, config_only.sha256) == (None, hashlib.sha256(b"A").hexdigest())
    file_only = folder_template(
        folder(tmp_path / "file", **{"tokenizer_config.json": "{}", "chat_template.jinja": "B"}), "math"
    )
    assert (file_only.source, file_only.sha256) == ("chat_template.jinja", hashlib.sha256(b"B").hexdigest())
    neither = folder(tmp_path / "neither", **{"tokenizer_config.json": "{}"})
    assert folder_template(neither, "math").path == paths.project_root() / "benchmark_configs/templates/math.jinja"
    assert folder_template(neither, None).source == "none"


def test_a_gguf_file_tells_its_own_template(tmp_path):
    file = gguf(tmp_path / "model.gguf", {"tokenizer.chat_template": "T"})
    prepared = resolve_model(config(file, "math", engine="llamacpp"))
    assert (prepared.chat_template_source, prepared.chat_template) == ("gguf", None)
    assert prepared.chat_template_sha256 == hashlib.sha256(b"T").hexdigest()


def test_a_gguf_file_without_a_template_gets_the_benchmarks(tmp_path):
    prepared = resolve_model(config(gguf(tmp_path / "model.gguf"), "code", engine="llamacpp"))
    assert prepared.chat_template_source == "benchmark"
    assert prepared.chat_template.name == "code.jinja"


def test_a_gguf_file_that_was_cut_off_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="its last tensor begins at .*; it was not copied whole"):
        resolve_model(config(gguf(tmp_path / "model.gguf", offset=10_000), engine="llamacpp"))


@pytest.mark.parametrize(
    ("content", "words"), [(b"ELF", "is no GGUF file"), (b"GGUF" + b"\xff" * 2000, "has a broken GGUF header")]
)
def test_a_file_that_is_no_gguf_file_is_named(tmp_path, content, words):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        resolve_model(config(tmp_path / "model.gguf", engine="llamacpp"))


def test_an_engine_that_cannot_load_the_model_names_the_one_that_can(tmp_path):
    with pytest.raises(CheckpointError, match="is a GGUF file; add --infra.engine=llamacpp"):
        resolve_model(config(gguf(tmp_path / "model.gguf")))
    with pytest.raises(CheckpointError, match="drop --infra.engine=llamacpp"):
        resolve_model(config(folder(tmp_path / "model"), engine="llamacpp"))
    with pytest.raises(CheckpointError, match="add --infra.engine=llamacpp"):
        resolve_model(config("SmolLM2-135M-Instruct"))


def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub():
    with pytest.raises(CheckpointError, match=r"model folder /no/such/model does not exist"):
        resolve_model(config("/no/such/model"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("team/math_run_step40", (40, None)),
        ("step-127120", (127120, None)),
        ("run/checkpoint-500", (500, None)),
        ("qwen_final", (None, "final")),
        ("Qwen3-1.7B-Base", (None, "base")),
        ("two-steps", (None, None)),
    ],
)
def test_step_and_stage_are_read_from_the_name(name, expected):
    assert step_and_stage(name) == expected


HUB_FILES = {
    "config.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"T", SINGLE: shard(), "README.md": b"not wanted",
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download needs: `org/tiny` at one commit."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in HUB_FILES.items()]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name} for name in HUB_FILES]
            self.answer(
                200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False}).encode()
            )
        elif path.startswith(f"/org/tiny/resolve/{COMMIT}/") and (name := path.rsplit("/", 1)[-1]) in HUB_FILES:
            self.answer(200, HUB_FILES[name], ETag=f'"{name}"', **{"X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", **{"X-Error-Code": "RepoNotFound"})

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetched(model, endpoint, cache):
    """What a process says that resolves `model`: the Hub's address is read once, at import."""
    script = """if True:
        import sys
        from modal_eval.checkpoints import resolve_model
        from modal_eval.config.load import resolve
        from modal_eval.config.models import BenchmarkConfig
        from modal_eval.errors import CheckpointError, IncompleteError
        try:
            found = resolve_model(resolve(sys.argv[1], BenchmarkConfig(env_id="toy")))
            print(found.source, found.served_name, found.revision, *sorted(one.name for one in found.path.iterdir()))
        except CheckpointError as error:
            print("CheckpointError:", error)
        """
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run([sys.executable, "-c", script, model], env=env, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def test_a_hub_model_is_pinned_to_its_commit_and_stays_usable_without_the_hub(hub, tmp_path):
    expected = f"hub org/tiny {COMMIT} chat_template.jinja config.json {SINGLE} tokenizer.json"
    assert fetched("org/tiny", hub, tmp_path) == expected
    assert fetched("org/tiny", "http://127.0.0.1:9", tmp_path) == expected


def test_a_model_that_the_hub_does_not_have_is_said_in_one_line(hub, tmp_path):
    said = fetched("org/none", hub, tmp_path)
    assert said.startswith("CheckpointError: 'org/none' is neither a folder here nor a model on the Hub")
    assert "\n" not in said


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(tmp_path):
    said = fetched("org/tiny", "http://127.0.0.1:9", tmp_path)
    assert "cannot be fetched from the Hub" in said
    assert "check the network and HF_ENDPOINT" in said
    assert "\n" not in said
