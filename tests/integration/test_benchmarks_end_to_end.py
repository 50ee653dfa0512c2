"""The five verifiers benchmarks through the whole of the command line, on files of test data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import Cli
from tests.support.data import data_file
from tests.support.llamacpp import MODEL, serving_llamacpp
from tests.support.upstream import upstream

FILES = {
    "gsm8k": "gsm8k/test.jsonl",
    "math500": "math500/test.jsonl",
    "aime2025": "aime/aime2025.jsonl",
    "ifeval": "ifeval/input_data.jsonl",
    "livecodebench": "livecodebench/lcb_v5_mini.jsonl",
}
needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed: apt-get install bubblewrap"
)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


@pytest.fixture(scope="module")
def llamacpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a real server with a real model, which this module shares."""
    # One thread: with two, and anything else on the machine, it falls to a tenth of its speed.
    with serving_llamacpp(tmp_path_factory.mktemp("llamacpp"), at_once=5, threads=1) as url:
        yield url


def shortest(name: str, folder: Path) -> Path:
    """A file of the five rows with the least to read: a small model on a busy core reads 100 tokens a second."""
    lines = [line for line in data_file(name).read_text(encoding="utf-8").split("\n") if line.strip()]
    questions = ("question", "problem", "prompt", "question_content")
    lines.sort(key=lambda line: len(next(row[key] for row in [json.loads(line)] for key in questions if key in row)))
    path = folder / Path(name).name
    path.write_text("\n".join(lines[:5]) + "\n", encoding="utf-8")
    return path


@needs_sandbox
@pytest.mark.parametrize("benchmark", FILES)
def test_five_examples_of_each_benchmark_end_with_a_number_of_a_real_model(
    cli: Cli, llamacpp: str, benchmark: str
) -> None:
    cli(
        "run", "-m", MODEL, "-b", benchmark, "--run-dir", str(cli.run_dir), f"--infra.base_url={llamacpp}",
        f"--env.data_files={shortest(FILES[benchmark], cli.folder)}", "--eval.num_examples=5", "--eval.rollouts=1",
        "--eval.max_concurrent=5", "--sampling.max_tokens=16",
    )  # fmt: skip
    summary = cli.metadata()
    assert summary["status"] == "complete"
    assert (summary["num_scored"], summary["num_unscored"]) == (5, 0)
    assert 0 <= summary["avg_reward"] <= 1
    assert summary["data"]["sha256"]
    assert summary["data"]["files"].keys() == {Path(FILES[benchmark]).name}
    assert [row["example_id"] for row in cli.rows()] == list(range(5))
    assert all(row["completion"][0]["content"] for row in cli.rows())
    if benchmark == "livecodebench":
        assert summary["scorer"]["args"]["sandbox_backend"] == "local"
        assert {row["info"]["sandbox"]["backend"] for row in cli.rows()} == {"local"}


@needs_sandbox
@pytest.mark.parametrize("benchmark", ["humaneval", "humaneval_plus", "mbpp", "mbpp_plus"])
def test_five_examples_of_each_of_evalplus_benchmarks_end_with_a_number_of_a_real_model(
    cli: Cli, llamacpp: str, benchmark: str
) -> None:
    human = benchmark.startswith("humaneval")
    file = "humaneval_plus/HumanEvalPlus-v0.1.10.jsonl.gz" if human else "mbpp_plus/MbppPlus-v0.2.0.jsonl.gz"
    cli(
        "run", "-m", MODEL, "-b", benchmark, "--run-dir", str(cli.run_dir), f"--infra.base_url={llamacpp}",
        f"--env.data_files={data_file(file)}", "--eval.num_examples=5", "--eval.max_concurrent=5", "--sampling.max_tokens=48",
    )  # fmt: skip
    summary = cli.metadata()
    assert (summary["status"], summary["num_scored"], summary["num_unscored"]) == ("complete", 5, 0)
    assert summary["avg_reward"] == summary["avg_metrics"]["plus_pass" if benchmark.endswith("plus") else "base_pass"]
    assert summary["sandboxes"] == {"local": 5}
    for row in cli.rows():
        assert row["completion"]
        assert set(row["status"]) == set(row["evalplus_status"]) == {"base", "plus"}


def replayed(cli: Cli, run_dir: Path, base_url: str, inputs: Path) -> dict[str, Any]:
    cli.run_dir = run_dir
    cli(
        "run", *cli.arguments(base_url, benchmark="ifeval"), f"--env.data_files={inputs}", "--eval.rollouts=1",
        "--sampling.max_tokens=2048", "--eval.max_concurrent=32",
    )  # fmt: skip
    return cli.metadata()


def test_the_papers_gpt4_answers_played_back_through_ifeval_get_every_label_and_the_papers_numbers_twice(
    cli: Cli,
) -> None:
    folder = data_file("labelled/ifeval_gpt4/expected.jsonl").parent
    inputs = folder / "input_data_gpt4_20231107_145030.jsonl"
    said = {row["prompt"]: row["response"] for row in jsonl(folder / "input_response_data_gpt4_20231107_145030.jsonl")}
    with upstream(answer="known", known=said) as server:
        replayed(cli, cli.folder / "first", server.base_url, inputs)
        first = cli.rows()
        summary = replayed(cli, cli.folder / "second", server.base_url, inputs)
    assert summary["num_scored"] == 541
    rows = cli.rows()
    scores = [name for name in rows[0] if name.startswith(("prompt_level", "inst_level"))] + ["reward"]
    assert [[row[name] for name in scores] for row in rows] == [[row[name] for name in scores] for row in first]
    assert_labels(rows, {row["key"]: row for row in jsonl(folder / "expected.jsonl")})
    assert_ranges(rows, json.loads((folder / "summary.json").read_text()))
    assert summary["avg_reward"] == pytest.approx(0.7689, abs=0.0025)


def assert_labels(rows: list[dict[str, Any]], expected: dict[int, dict[str, Any]]) -> None:
    for row in rows:
        for mode in ("strict", "loose"):
            labels = expected[row["info"]["key"]][f"google_{mode}"]
            if None in labels:
                continue
            assert row[f"prompt_level_{mode}"] == float(all(labels)), (row["info"]["key"], mode)
            assert row[f"inst_level_{mode}"] == pytest.approx(sum(labels) / len(labels)), (row["info"]["key"], mode)


def assert_ranges(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """The counts that the original scorer gives, as wide as its coin flips make them, and the paper's percentages."""
    for mode in ("strict", "loose"):
        prompts = sum(row[f"prompt_level_{mode}"] for row in rows)
        instructions = sum(row[f"inst_level_{mode}"] * row["num_instructions"] for row in rows)
        low, high = summary[mode]["prompt_correct_range"]
        assert low <= prompts <= high
        low, high = summary[mode]["inst_correct_range"]
        assert low - 1e-6 <= instructions <= high + 1e-6
        paper = summary["published_paper"]
        assert 100 * prompts / len(rows) == pytest.approx(paper[f"prompt_{mode}"], abs=0.4)
        assert 100 * instructions / sum(row["num_instructions"] for row in rows) == pytest.approx(
            paper[f"inst_{mode}"], abs=0.4
        )
