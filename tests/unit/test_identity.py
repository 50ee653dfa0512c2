import pytest

from modal_eval.config.identity import config_identity, differences, identity_sha256
from modal_eval.config.load import resolve
from modal_eval.config.models import BenchmarkConfig, Overrides


def identity_of(**overrides):
    benchmark = BenchmarkConfig(name="toy", env_id="toy-env", sampling={"temperature": 0.6})
    return config_identity(resolve("org/model", benchmark, Overrides(**overrides)))


def test_the_identity_hash_is_pinned():
    """A journal's answers are found again by this hash: it may change only together with identity.VERSION."""
    assert identity_sha256(identity_of()) == "3b570532ecab1efc944f84469009745b8f8b7d79828515044e8b1b526efab4fb"


@pytest.mark.parametrize(
    "overrides",
    [
        {"sampling": {"temperature": 0.7}},
        {"sampling": {"seed": 1}},
        {"sampling": {"max_tokens": 17}},
        {"vllm": {"dtype": "float32"}},
        {"vllm": {"max_model_len": 8192}},
        {"vllm": {"tensor_parallel_size": 2}},
        {"vllm": {"revision": "abc"}},
        {"vllm": {"extra_args": {"max_num_seqs": 2}}},
        {"infra": {"engine": "llamacpp"}},
        {"env": {"split": "train"}},
        {"eval": {"harness_api": "v1"}},
    ],
)
def test_whatever_changes_an_answer_changes_the_identity(overrides):
    assert identity_sha256(identity_of(**overrides)) != identity_sha256(identity_of())


@pytest.mark.parametrize(
    "overrides",
    [
        {"eval": {"max_concurrent": 3}},
        {"eval": {"num_examples": 3}},
        {"eval": {"rollouts": 9}},
        {"eval": {"retries": 1}},
        {"infra": {"timeout": 60}},
        {"infra": {"gpu": "H100:2"}},
        {"vllm": {"data_parallel_size": 2}},
        {"vllm": {"gpu_memory_utilization": 0.5}},
    ],
)
def test_how_fast_and_how_much_is_asked_leaves_the_identity_alone(overrides):
    assert identity_of(**overrides) == identity_of()


@pytest.mark.parametrize("key", ["data_files", "fewshot_files"])
def test_a_data_file_counts_by_its_content_and_not_by_its_name(tmp_path, key):
    for name, content in (("a.jsonl", "1"), ("b.jsonl", "1"), ("c.jsonl", "2")):
        (tmp_path / name).write_text(content)
    a, b, c = (identity_of(env={key: str(tmp_path / f"{name}.jsonl")}) for name in "abc")
    assert a == b
    assert a != c


def test_differences_name_every_leaf_with_both_values():
    before = {"sampling": {"temperature": 0.0, "seed": 1}, "model": "a"}
    now = {"sampling": {"temperature": 0.5, "seed": 1}, "data": "x", "model": "a"}
    assert list(differences(before, now)) == [("data", None, "x"), ("sampling.temperature", 0.0, 0.5)]


def test_what_only_scores_and_what_only_describes_leaves_the_identity_alone():
    def identity(about=None, **env):
        benchmark = BenchmarkConfig(name="toy", env_id="toy-env", scoring_args=["extraction"], about=about)
        return config_identity(resolve("org/model", benchmark, Overrides(env=env)))

    about = {"data": "d", "revision": "r", "prompt": "p", "metric": "m"}
    assert identity() == identity(extraction="strict") == identity(about=about)
    assert identity() != identity(system_prompt="Be brief.")
