"""lm-eval's benchmarks as whole runs: with a real model, killed and resumed, scored without a server."""

import gzip
import json

import pytest

from modal_eval.config.load import benchmark_files, load_benchmark
from modal_eval.errors import HarnessError
from tests.support.cli import kill, repeated
from tests.support.data import data_file
from tests.support.llamacpp import MODEL, serving_llamacpp
from tests.support.lm_eval_runs import job, run, run_job, shipped
from tests.support.upstream import upstream

pytestmark = pytest.mark.timeout(600)
DATA = {
    "gsm8k_4shot": "gsm8k", "gsm8k_8shot": "gsm8k", "gsm8k_cot_4shot": "gsm8k", "gsm8k_cot_8shot": "gsm8k",
    "minerva_math": "math", "hendrycks_math": "math", "math_qwen": "math", "ifeval_lm_eval": "ifeval",
    "mbpp_3shot": "mbpp", "humaneval_0shot": "humaneval", "mmlu_pro": "mmlu", "gpqa_diamond": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory):
    """Base URL of a real server that this module shares."""
    with serving_llamacpp(tmp_path_factory.mktemp("llamacpp"), at_once=2, threads=1) as url:
        yield url


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def worked_examples(benchmark, folder):
    """A file with worked examples for a benchmark whose own stand on the Hub."""
    if benchmark.startswith("gsm8k") and "cot" not in benchmark:
        return data_file("gsm8k/train.jsonl")
    if benchmark not in ("hendrycks_math", "mmlu_pro"):
        return None
    name, kind = (
        ("math/test_5000.jsonl.gz", "type") if benchmark == "hendrycks_math" else ("mmlu_pro/test.jsonl.gz", "category")
    )
    groups = {}
    for line in gzip.decompress(data_file(name).read_bytes()).splitlines():
        row = json.loads(line)
        row["cot_content"] = f"A: Let's think step by step. The answer is ({row.get('answer')})."
        groups.setdefault(row[kind], []).append(row)
    return write_lines(folder / "worked.jsonl", [row for rows in groups.values() for row in rows[-5:]])


def questions_of_our_own(folder):
    """Six questions in GPQA's format; the real ones are not to be published."""
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [
        {
            "Question": f"How much is {n} and {n}?",
            **dict(zip(names, map(str, (2 * n, n, n + 1, 3 * n + 1)), strict=True)),
        }
        for n in range(1, 7)
    ]
    return write_lines(folder / "questions.jsonl", rows)


def configured(benchmark, folder, **overrides):
    data = DATA[benchmark] or questions_of_our_own(folder)
    shown = worked_examples(benchmark, folder)
    env = {"fewshot_files": str(shown)} if shown else {}
    return shipped(benchmark, data, model=MODEL, env=env, eval={"num_examples": 5}, **overrides)


def test_every_shipped_benchmark_of_lm_eval_is_tested_here_and_has_the_settings_that_the_team_requires():
    shipped_names = {name for name in benchmark_files() if load_benchmark(name).eval.harness == "lm_eval"}
    assert shipped_names == set(DATA)
    for name in shipped_names:
        config = load_benchmark(name)
        vllm, sampling = config.vllm, config.sampling
        assert (vllm.tensor_parallel_size, vllm.max_model_len, vllm.gpu_memory_utilization) == (1, 4096, 0.8)
        assert (vllm.seed, vllm.dtype, sampling.seed, sampling.temperature) == (42, "bfloat16", 42, 0)


@pytest.mark.parametrize("benchmark", sorted(DATA))
def test_five_examples_of_each_benchmark_with_a_real_model_end_with_a_number(benchmark, llamacpp, tmp_path):
    config = configured(benchmark, tmp_path, sampling={"max_tokens": 16})
    if config.env_args["num_fewshot"] > 1:  # eight examples are a minute of reading for a CPU
        config = config.model_copy(update={"env_args": {**config.env_args, "num_fewshot": 1}})
    ran = run(config, llamacpp, tmp_path)
    assert [row["error"] for row in ran.rows] == [None] * 5
    assert all(0 <= row["reward"] <= 1 for row in ran.rows)
    assert all(row["usage"]["completion_tokens"] > 0 for row in ran.rows)
    assert ran.column(config.env_args["metric"]) == ran.column("reward")


def test_a_server_that_gives_no_log_probabilities_of_a_prompt_is_named_before_everything_is_asked(llamacpp, tmp_path):
    task = "{task: pick, dataset_path: json, dataset_kwargs: {data_files: {test: FILE}}, output_type: multiple_choice, test_split: test, doc_to_text: '{{q}}', doc_to_target: 0, doc_to_choice: [a, b]}"
    (tmp_path / "pick.yaml").write_text(
        task.replace("FILE", str(write_lines(tmp_path / "pick.jsonl", [{"q": "Which?"}])))
    )
    asked = job("pick", llamacpp, phase="generate", env_args={"include_path": str(tmp_path)}, model=MODEL)
    with pytest.raises(HarnessError, match="vLLM does, llama.cpp does not"):
        run_job(asked, tmp_path)


def test_a_run_killed_in_the_middle_is_resumed_scored_and_reported_with_the_numbers_of_lm_eval(cli, mark, tmp_path):
    rows = [json.loads(line) for line in data_file("mbpp/mbpp.jsonl").read_text().splitlines()]
    known = {row["text"]: row["code"] for row in rows if 11 <= row["task_id"] < 31}
    spoilt = next(iter(known))
    known[spoilt] = "import sys\nsys.exit(0)"
    settings = [
        "--eval.num_examples=20", "--eval.max_concurrent=4", "--infra.target=endpoint", "--eval.retries=20",
        f"--env.data_files={data_file('mbpp/mbpp.jsonl')}",
    ]  # fmt: skip
    with upstream(answer="known", known=known, latency=0.4) as server:
        process = cli.start("run", *cli.arguments(server.base_url, *settings, benchmark="mbpp_3shot"))
        cli.wait_for(lambda: server.stats()["posts"] >= 8, process)
        kill(process)
        assert mark.wait_until_gone() == {}
        in_transit = cli.in_transit(server)
        cli("resume", str(cli.run_dir))
        stats = server.stats()
        assert repeated(server) <= in_transit
        assert len(stats["finished"]) == 20
    summary = cli.metadata()
    assert summary["num_scored"] == 20
    assert summary["avg_reward"] == pytest.approx(19 / 20)
    assert summary["avg_metrics"] == {"pass_at_1,none": pytest.approx(19 / 20)}
    assert summary["lm_eval"]["results"]["mbpp"]["pass_at_1,none"] == pytest.approx(19 / 20)
    assert summary["lm_eval"]["n-samples"]["mbpp"] == {"original": 500, "effective": 20}
    (cli.run_dir / "results.jsonl").unlink()  # what the journal holds needs no server
    ended = cli("resume", str(cli.run_dir))
    assert cli.metadata()["avg_reward"] == summary["avg_reward"]
    assert "pass_at_1,none" in ended.stdout + ended.stderr
