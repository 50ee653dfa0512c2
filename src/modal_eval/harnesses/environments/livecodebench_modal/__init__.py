"""LiveCodeBench, code generation: competition problems; a program passes when it passes every test, public and hidden.

The reference window is that of the public leaderboard: release v6, 2024-08-01 to 2025-05-01, 454 problems. Programs run
in modal-eval's own sandbox, on this machine or on Modal. Metrics: `passed`, `pass_rate`, `num_test_cases`.
"""

from __future__ import annotations

from typing import Any

import verifiers as vf

from modal_eval.harnesses.envkit.code import ROW_INFO, checked_sandbox, extract_code
from modal_eval.harnesses.envkit.data import Data, DataFiles, HubData, Row, load_data, make_dataset
from modal_eval.scoring.sandbox import Sandbox

from .judging import Judgement, judge, limits_for
from .problems import as_problem, in_window, question

REPOSITORY = "livecodebench/code_generation_lite"
REVISION = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
VERSIONS = {f"v{n}": ("test.jsonl", *(f"test{i}.jsonl" for i in range(2, n + 1))) for n in range(1, 7)}
COLUMNS = (
    "question_id", "question_content", "starter_code", "platform", "difficulty", "contest_date", "metadata",
    "public_test_cases", "private_test_cases",
)  # fmt: skip
WINDOW = ("2024-08-01", "2025-05-01")
SYSTEM_PROMPT = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)


def load_environment(
    revision: str | None = None,
    data_files: DataFiles = None,
    version: str = "v6",
    start_date: str | None = None,
    end_date: str | None = None,
    difficulty: str | None = None,
    sandbox_backend: str = "local",
    timeout_per_test: float = 6.0,
    memory_gb: float = 4.0,
    system_prompt: str | None = SYSTEM_PROMPT,
) -> vf.Environment:
    """Dates are `YYYY-MM-DD`, both ends included; by default the leaderboard's window for the Hub's data and no
    window for `data_files`. `sandbox_backend` is `local`, `modal`, or `process` for limits without walls.
    `timeout_per_test` is CPU time in seconds, where the official checker takes 6 by the clock."""
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} does not exist; there are {', '.join(VERSIONS)}")
    sandbox = checked_sandbox(sandbox_backend)
    if not data_files and not (start_date or end_date):
        start_date, end_date = WINDOW
    hub = HubData(REPOSITORY, REVISION, files=VERSIONS[version], columns=COLUMNS)
    read = load_data(hub, revision, data_files, keep=lambda row: in_window(row, start_date, end_date, difficulty))
    data = Data(read.rows, {**read.source, "start_date": start_date, "end_date": end_date, "difficulty": difficulty})
    problems = {str(row["question_id"]): row for row in data.rows}

    def convert(row: Row) -> Row:
        info = {name: str(row[name]) for name in ("question_id", "platform", "difficulty", "contest_date")}
        return {"question": question(row), "answer": "", "info": info}

    parser = vf.Parser(extract_fn=extract_code)
    rubric = make_rubric(parser, problems, sandbox, timeout_per_test, memory_gb)
    environment = vf.SingleTurnEnv(
        eval_dataset=make_dataset(data, convert), system_prompt=system_prompt, parser=parser, rubric=rubric
    )
    environment.data_source = data.source
    environment.scores_later = True  # its tests take longer than some answers, and a GPU would wait for them
    return environment


class CodeRubric(vf.Rubric):
    """Gives the sandbox back with the environment."""

    sandbox: Sandbox

    async def teardown(self) -> None:
        await super().teardown()
        self.sandbox.close()


def make_rubric(
    parser: Any, problems: dict[str, Row], sandbox: Sandbox, timeout_per_test: float, memory_gb: float
) -> vf.Rubric:
    async def passed(parser: Any, completion: Any, info: Any, state: Any) -> float:
        """1 if every test passed."""
        problem = as_problem(problems[info["question_id"]])
        code = parser.parse_answer(completion) or ""
        limits = limits_for(len(problem.tests), timeout_per_test, memory_gb)
        judged = await judge(problem, code, sandbox, limits) if code else Judgement([], {}, tampered=False)
        state["tests_passed"], state["tests"] = sum(judged.passed), len(problem.tests)
        state[ROW_INFO] = {"sandbox": sandbox.facts(), "tests": judged.statuses, "tampered": judged.tampered}
        return float(sum(judged.passed) == len(problem.tests))

    def pass_rate(state: Any) -> float:
        """Share of the tests that passed; tests after a time-out count as failed."""
        return float(state["tests_passed"] / state["tests"])

    def num_test_cases(state: Any) -> float:
        return float(state["tests"])

    rubric = CodeRubric(funcs=[passed, pass_rate, num_test_cases], weights=[1.0, 0.0, 0.0], parser=parser)
    rubric.sandbox = sandbox
    return rubric
