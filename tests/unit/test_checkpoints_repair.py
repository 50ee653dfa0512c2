import json
import os

import pytest

from modal_eval.checkpoints.repair import repaired
from modal_eval.checkpoints.weights import INDEX, SINGLE, SINGLE_SHARD, check_folder, missing_numbers, read_index
from modal_eval.errors import CheckpointError, IncompleteError
from tests.support.checkpoints import checkpoint, index_of, shard, write

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODAL_EVAL_CACHE_DIR", str(tmp_path / "cache"))


def state_of(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("there", "named"),
    [
        ({SINGLE: ("a", "b")}, {"a": SINGLE_SHARD, "b": SINGLE_SHARD}),
        ({SINGLE_SHARD: ("a", "b")}, {"a": SINGLE, "b": SINGLE}),
        ({SINGLE: ("a", "b")}, {"a": FIRST, "b": SECOND}),
        ({FIRST: ("a",), SECOND: ("b",)}, {"a": SINGLE, "b": SINGLE}),
        ({FIRST: ("a",), SECOND: ("b",)}, {"a": SECOND, "b": FIRST}),
    ],
    ids=["the quirk", "its reverse", "index of shards, one file", "index of one file, shards", "tensors moved"],
)
def test_an_index_that_disagrees_with_the_weights_is_made_anew_and_the_source_is_not_touched(tmp_path, there, named):
    source = write(tmp_path / "run_step40", {**checkpoint(there), INDEX: index_of(named)})
    before = state_of(source)
    made = repaired(source)
    assert made != source
    assert read_index(made / INDEX) == {tensor: file for file, tensors in there.items() for tensor in tensors}
    check_folder(made)
    assert {file.name: file.read_bytes() for file in made.iterdir() if file.name != INDEX} == {
        name: content for name, (content, _) in before.items() if name != INDEX
    }
    assert state_of(source) == before
    assert repaired(source) == made


def test_a_folder_that_agrees_with_its_index_is_left_as_it_is(tmp_path):
    whole = write(tmp_path / "whole", checkpoint({FIRST: ("a",), SECOND: ("b",)}))
    single = write(tmp_path / "single", checkpoint({SINGLE: ("a",)}))
    assert (repaired(whole), repaired(single)) == (whole, single)


def test_a_repair_is_made_again_when_the_source_has_changed(tmp_path):
    source = write(tmp_path / "model", {**checkpoint({SINGLE: ("a",)}), INDEX: index_of({"a": SINGLE_SHARD})})
    first = repaired(source)
    (source / SINGLE).write_bytes(shard("a", "b"))
    os.utime(source / SINGLE, ns=(1, 1))
    second = repaired(source)
    assert second != first
    assert read_index(second / INDEX) == {"a": SINGLE, "b": SINGLE}


def test_a_tensor_that_is_nowhere_cannot_be_repaired_and_is_named(tmp_path):
    named = {"a": SINGLE_SHARD, "b": SINGLE_SHARD, "c": SINGLE_SHARD}
    source = write(tmp_path / "model", {**checkpoint({SINGLE: ("a",)}), INDEX: index_of(named)})
    with pytest.raises(CheckpointError, match=rf"cannot be repaired: .* names {SINGLE_SHARD}.* {SINGLE} lacks b, c;"):
        repaired(source)


def test_two_sets_of_weights_that_could_both_be_meant_are_named(tmp_path):
    files = checkpoint({SINGLE: ("a", "b"), FIRST: ("a",), SECOND: ("b",)}, index=False)
    source = write(tmp_path / "model", {**files, INDEX: index_of({"a": SINGLE_SHARD, "b": SINGLE_SHARD})})
    with pytest.raises(CheckpointError, match=rf"{SINGLE} or {FIRST} … could be meant"):
        repaired(source)


def test_tied_embeddings_may_be_missing_and_others_may_not(tmp_path):
    files = {**checkpoint({SINGLE: ("a",)}), INDEX: index_of({"a": SINGLE, "lm_head.weight": SINGLE})}
    tied = write(tmp_path / "tied", {**files, "config.json": b'{"tie_word_embeddings": true}'})
    assert repaired(tied) == tied
    check_folder(tied)
    with pytest.raises(IncompleteError, match=rf"{SINGLE} lacks lm_head.weight, which {INDEX} promises"):
        check_folder(write(tmp_path / "untied", files))


@pytest.mark.parametrize(
    ("without", "words"),
    [
        ("config.json", "lacks config.json"),
        (("tokenizer.json", "tokenizer_config.json"), "lacks a tokenizer"),
        (SECOND, f"lacks {SECOND}, named by {INDEX}"),
        ((SECOND, INDEX), f"lacks {SECOND}"),
        ((FIRST, SECOND), "lacks weights"),
    ],
)
def test_a_checkpoint_that_is_still_being_written_is_incomplete_and_what_it_lacks_is_named(tmp_path, without, words):
    files = checkpoint({FIRST: ("a",), SECOND: ("b",)})
    for name in [without] if isinstance(without, str) else without:
        del files[name]
    folder = write(tmp_path / "model", files)
    with pytest.raises(IncompleteError, match=f"model is incomplete: it {words}"):
        check_folder(repaired(folder))


def test_a_shard_that_is_still_being_copied_is_incomplete(tmp_path):
    files = checkpoint({FIRST: ("a",), SECOND: ("b",)})
    folder = write(tmp_path / "model", {**files, SECOND: files[SECOND][:-3]})
    with pytest.raises(IncompleteError, match=f"{SECOND} is .* was not copied whole"):
        check_folder(repaired(folder))


def test_a_tensor_that_its_shard_does_not_have_is_named(tmp_path):
    named = {"a": FIRST, "b": SECOND, "c": SECOND}
    folder = write(tmp_path / "model", {**checkpoint({FIRST: ("a",), SECOND: ("b",)}), INDEX: index_of(named)})
    with pytest.raises(IncompleteError, match=f"{SECOND} lacks c, which {INDEX} promises"):
        check_folder(repaired(folder))


def test_numbered_files_say_which_of_them_are_missing():
    assert missing_numbers([FIRST, "tokenizer.json", SINGLE]) == [SECOND]
    assert missing_numbers([FIRST, SECOND]) == []
    assert missing_numbers(["x-00002-of-00003.safetensors"]) == [
        "x-00001-of-00003.safetensors",
        "x-00003-of-00003.safetensors",
    ]


def test_an_index_of_pytorch_files_is_held_to_its_files(tmp_path):
    files = checkpoint({}, index=False)
    files |= {
        "pytorch_model-00001-of-00002.bin": b"x",
        "pytorch_model.bin.index.json": json.dumps(
            {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
        ).encode(),
    }
    with pytest.raises(
        IncompleteError, match="lacks pytorch_model-00002-of-00002.bin, named by pytorch_model.bin.index"
    ):
        check_folder(write(tmp_path / "model", files))
