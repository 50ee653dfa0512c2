"""`modal-eval score` on real finished runs: no server is up, the journal has the answers, and what would change one is refused."""

import json
import re
from pathlib import Path

import pytest

from modal_eval.metrics import maj_at_k, mean, pass_at_k
from tests.support.cli import Cli, kill
from tests.support.upstream import upstream

QUESTIONS = {f"{n} apples and {n * 3} pears are how many?": str(n * 4) for n in range(1, 9)}

VERSIONED = """
import asyncio
import verifiers as vf
from datasets import Dataset


def load_environment(delay: float = 0.0) -> vf.Environment:
    rows = [{"question": f"PROMPT {i}", "answer": str(i)} for i in range(4)]

    async def score(completion: list) -> float:
        await asyncio.sleep(delay)
        return SCORE

    return vf.SingleTurnEnv(eval_dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[score]))
"""


def data_file(folder: Path) -> Path:
    """GSM8K's format, made here."""
    path = folder / "apples.jsonl"
    rows = [{"question": question, "answer": f"Add.\n#### {answer}"} for question, answer in QUESTIONS.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ANSWERED = 6
"""Of the questions, in the first run."""


def finished_gsm8k(cli: Cli, *more: str) -> None:
    """A run whose answers end in `#### NUMBER`, about half of them right, and none in a box. The server is gone after."""
    with upstream(answer="gsm8k", known=QUESTIONS) as server:
        arguments = cli.arguments(
            server.base_url, f"--env.data_files={data_file(cli.folder)}", *more, benchmark="gsm8k"
        )
        cli("run", *arguments)


def contents(run_dir: Path) -> dict[str, bytes]:
    """What a refusal has to leave alone: everything but the lock, the logs and the progress."""
    left_out = {"run.lock", "checkpoint.lock", "checkpoint_meta.json"}
    return {
        str(path.relative_to(run_dir)): path.read_bytes()
        for path in sorted(run_dir.rglob("*"))
        if path.is_file() and path.name not in left_out and "logs" not in path.parts
    }


def said(row: dict) -> str:
    return re.findall(r"#### (\d+)", row["completion"][-1]["content"])[-1]


def test_another_extraction_and_other_ks_come_from_the_journal_and_a_resume_goes_on_with_them(cli):
    finished_gsm8k(cli, f"--eval.num_examples={ANSWERED}")
    before, first = contents(cli.run_dir), cli.metadata()
    assert (first["avg_reward"], first["scorer"]["args"]) == (0.0, {"extraction": None})
    assert all(row["extracted"] == "" for row in cli.rows())

    cli("score", str(cli.run_dir), "--env.extraction=last_number")
    rows, again = cli.rows(), cli.metadata()
    assert [row["extracted"] for row in rows] == [said(row) for row in rows]
    assert [row["reward"] for row in rows] == [float(said(row) == row["answer"]) for row in rows]
    assert again["avg_reward"] == mean([row["reward"] for row in rows]) > 0
    assert again["scorer"]["args"] == {"extraction": "last_number"}
    assert again["identity_sha256"] == first["identity_sha256"]
    after = contents(cli.run_dir)
    assert after["checkpoint.jsonl"] == before["checkpoint.jsonl"]
    for name in ("results.jsonl", "metadata.json"):
        assert after[f"scores/1/{name}"] == before[name]

    # The extraction stays until another is asked for; the numbers are those of brute force over the rows.
    shown = cli("score", str(cli.run_dir), "--eval.k=1,3", "--eval.scoring_workers=1")
    by_example = [[row for row in rows if row["example_id"] == example] for example in range(ANSWERED)]
    third = cli.metadata()
    assert third["scorer"]["k"] == [1, 3]
    assert third["pass_at_k"] == {
        f"pass@{k}": pytest.approx(mean([pass_at_k(4, int(sum(r["reward"] for r in one)), k) for one in by_example]))
        for k in (1, 3)
    }
    assert third["maj_at_k"]["maj@3"] == pytest.approx(
        mean([maj_at_k([r["extracted"] for r in one], [r["reward"] for r in one], 3) for one in by_example])
    )
    assert contents(cli.run_dir)["scores/2/results.jsonl"] == after["results.jsonl"]
    assert "maj@3" in shown.stdout
    assert "95% interval" in shown.stdout
    assert "scores/2" in shown.stderr
    timed = [json.loads(line) for line in (cli.run_dir / "results.jsonl").read_text().splitlines()]
    generated = [json.loads(line)["generation_ms"] for line in before["results.jsonl"].splitlines()]
    assert [row["generation_ms"] for row in timed] == generated

    with upstream(answer="gsm8k", known=QUESTIONS) as server:
        cli("resume", str(cli.run_dir), "--eval.num_examples=null", f"--infra.base_url={server.base_url}")
        assert server.stats()["posts"] == 4 * (len(QUESTIONS) - ANSWERED)
    rows = cli.rows()
    assert len(rows) == 4 * len(QUESTIONS)
    assert [row["reward"] for row in rows] == [float(said(row) == row["answer"]) for row in rows]
    assert cli.metadata()["scorer"]["args"] == {"extraction": "last_number"}


def test_what_would_change_an_answer_is_refused_by_name_and_nothing_is_touched(cli):
    finished_gsm8k(cli, "--eval.rollouts=2")
    before, progress = contents(cli.run_dir), (cli.run_dir / "checkpoint_meta.json").read_bytes()
    other = cli.folder / "other.jsonl"
    other.write_text((cli.folder / "apples.jsonl").read_text().replace("apples", "figs"))
    refused = {
        "--sampling.temperature=0.1": "sampling.temperature: 0.7 in the folder, 0.1 asked for",
        "--vllm.max_model_len=9000": "vllm.max_model_len: 16384 in the folder, 9000 asked for",
        "--env.system_prompt=Hello": "env_args.system_prompt: None in the folder, 'Hello' asked for",
        f"--env.data_files={other}": "env_args.data_files",
        "--eval.rollouts=1": "eval.rollouts: 2 in the folder, 1 asked for",
        "--eval.k=3": "eval.k=3 is more than eval.rollouts=2",
    }
    for option, words in refused.items():
        (line,) = cli("score", str(cli.run_dir), option, expect=2).stderr.splitlines()
        assert words in line, line
    assert "--env.extraction" in cli("score", str(cli.run_dir), "--sampling.seed=3", expect=2).stderr
    (cli.folder / "apples.jsonl").write_text(other.read_text())
    assert "data_files" in cli("score", str(cli.run_dir), expect=2).stderr
    assert contents(cli.run_dir) == before
    assert (cli.run_dir / "checkpoint_meta.json").read_bytes() == progress


def test_a_resume_with_another_scorer_is_refused_by_name_and_scoring_again_takes_it(cli):
    finished_gsm8k(cli, f"--eval.num_examples={ANSWERED}")
    before = contents(cli.run_dir)
    for command in (["resume", str(cli.run_dir)], ["run", "-m", "stub", "-b", "gsm8k", "--run-dir", str(cli.run_dir)]):
        (line,) = cli(*command, "--env.extraction=last_number", expect=2).stderr.splitlines()
        assert "env_args.extraction: None in the folder, 'last_number' now" in line
        assert f"`modal-eval score {cli.run_dir} --env.extraction=last_number`" in line
    assert contents(cli.run_dir) == before
    cli("score", str(cli.run_dir), "--env.extraction=last_number")
    cli("resume", str(cli.run_dir), "--env.extraction=last_number")
    assert cli.metadata()["scorer"]["args"] == {"extraction": "last_number"}


def write_version(cli: Cli, *, prompt: str = "Say", score: str = "1.0") -> None:
    text = VERSIONED.replace("PROMPT", prompt).replace("SCORE", score)
    (cli.folder / "environments").mkdir(exist_ok=True)
    (cli.folder / "environments" / "versioned_env.py").write_text(text)


def finished_versioned(cli: Cli) -> dict[str, bytes]:
    write_version(cli)
    settings = {"module_paths": [str(cli.folder / "environments")]}
    benchmark = cli.benchmark(env_id="versioned-env", eval=settings, scoring_args=["delay"])
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url, benchmark=benchmark))
    return contents(cli.run_dir)


def test_a_new_version_of_the_scorer_is_named_with_its_numbers_even_after_a_kill_and_other_prompts_are_refused(cli):
    before = finished_versioned(cli)
    first = cli.metadata()
    write_version(cli, score="0.0")
    process = cli.start("score", str(cli.run_dir), "--env.delay=60")
    cli.wait_for(lambda: any("adapters/run.py" in line for line in cli.mark.processes().values()), process)
    kill(process)
    assert cli.mark.wait_until_gone() == {}
    assert contents(cli.run_dir) == before
    cli("score", str(cli.run_dir))
    second = cli.metadata()
    assert (first["avg_reward"], second["avg_reward"]) == (1.0, 0.0)
    assert second["scorer"]["environment"]["sha256"] == second["environment"]["sha256"]
    assert second["scorer"]["environment"]["sha256"] != first["scorer"]["environment"]["sha256"]
    assert second["scorer"]["harness"] == first["scorer"]["harness"]
    assert second["scorer"]["scored_at"] > first["scorer"]["scored_at"]
    assert contents(cli.run_dir)["scores/1/metadata.json"] == before["metadata.json"]

    kept = contents(cli.run_dir)
    write_version(cli, prompt="Tell me")
    assert "asks other prompts (data.prompts_sha256" in cli("score", str(cli.run_dir), expect=2).stderr
    assert contents(cli.run_dir) == kept


def test_a_turn_that_the_journal_does_not_have_is_refused_and_the_scores_stand(cli):
    folder = cli.folder / "environments"
    folder.mkdir()
    source = Path(__file__).parents[1] / "fixtures" / "environments" / "guess_env.py"
    (folder / "guess_env.py").write_text(source.read_text())
    benchmark = cli.benchmark(env_id="guess-env", eval={"module_paths": [str(folder)]})
    with upstream() as server:
        cli("run", *cli.arguments(server.base_url, benchmark=benchmark))
    before = contents(cli.run_dir)
    (folder / "guess_env.py").write_text(source.read_text().replace("no, try", "wrong, try"))
    ended = cli("score", str(cli.run_dir), expect=2)
    assert "1 of the rollouts that have a score ask something now that the journal does not answer" in ended.stderr
    assert "example 2 rollout 0" in ended.stderr
    assert contents(cli.run_dir) == before


def test_lm_evals_metric_is_chosen_again_from_the_journal_and_its_extracted_answers_vote(cli):
    files = [f"--env.data_files={data_file(cli.folder)}", f"--env.fewshot_files={data_file(cli.folder)}"]
    with upstream(answer="gsm8k", known=QUESTIONS) as server:
        sampled = ["--sampling.temperature=0.7", "--eval.rollouts=3", "--env.num_fewshot=2"]
        cli("run", *cli.arguments(server.base_url, *files, *sampled, benchmark="gsm8k_4shot"))
    first, rows = cli.metadata(), cli.rows()
    assert first["scorer"]["args"] == {"metric": "exact_match,flexible-extract"}
    assert [row["extracted"] for row in rows] == [row["info"]["filtered"]["flexible-extract"][0] for row in rows]
    assert set(first["maj_at_k"]) == {"maj@1", "maj@2", "maj@3"}
    cli("score", str(cli.run_dir), "--env.metric=exact_match,strict-match", "--eval.k=3")
    again = cli.metadata()
    assert again["scorer"]["args"] == {"metric": "exact_match,strict-match"}
    assert [row["extracted"] for row in cli.rows()] == [row["info"]["filtered"]["strict-match"][0] for row in rows]
    assert again["avg_reward"] == first["avg_metrics"]["exact_match,strict-match"]
    assert set(again["pass_hat_k"]) == {"pass^3"}
