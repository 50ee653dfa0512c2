"""LiveCodeBench, code generation: competition problems; a program passes when it passes every test, public and hidden.

The reference window is that of the public leaderboard: release v6, 2024-08-01 to 2025-05-01, 454 problems. Programs run
in modal-eval's own sandbox. Metrics: `passed`, `pass_rate`, `num_test_cases`.
"""

from __future__ import annotations

from typing import Any

import verifiers as vf

from modal_eval.harnesses.envkit.code import extract_code, in_sandbox, make_sandbox, same_output, same_value
from modal_eval.harnesses.envkit.data import Data, DataFiles, HubData, Row, load_data, make_dataset
from modal_eval.scoring.sandbox import Limits, Sandbox

from .problems import PRELUDE, Problem, as_problem, in_window, question

REPOSITORY = "livecodebench/code_generation_lite"
REVISION = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
VERSIONS = {f"v{n}": ("test.jsonl", *(f"test{i}.jsonl" for i in range(2, n + 1))) for n in range(1, 7)}
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
    window for `data_files`. `timeout_per_test` is CPU time, in seconds, as is the official checker's 6."""
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} does not exist; there are {', '.join(VERSIONS)}")
    sandbox = make_sandbox(sandbox_backend)
    if not data_files and not (start_date or end_date):
        start_date, end_date = WINDOW
    hub = HubData(REPOSITORY, REVISION, files=VERSIONS[version])
    read = load_data(hub, revision, data_files, keep=lambda row: in_window(row, start_date, end_date, difficulty))
    data = Data(read.rows, {**read.source, "start_date": start_date, "end_date": end_date, "difficulty": difficulty})
    problems = {str(row["question_id"]): row for row in data.rows}

    def convert(row: Row) -> Row:
        info = {name: str(row[name]) for name in ("question_id", "platform", "difficulty", "contest_date")}
        return {"question": question(row), "answer": "", "info": {**info, "sandbox_backend": sandbox_backend}}

    limits = Limits(cpu_s=timeout_per_test, memory_bytes=int(memory_gb * (1 << 30)))
    parser = vf.Parser(extract_fn=extract_code)
    rubric = make_rubric(parser, problems, sandbox, limits)
    environment = vf.SingleTurnEnv(
        eval_dataset=make_dataset(data, convert), system_prompt=system_prompt, parser=parser, rubric=rubric
    )
    environment.data_source = data.source
    return environment


def make_rubric(parser: Any, problems: dict[str, Row], sandbox: Sandbox, limits: Limits) -> vf.Rubric:
    async def passed(parser: Any, completion: Any, info: Any, state: Any) -> float:
        """1 if every test passed."""
        problem = as_problem(problems[info["question_id"]])
        code = parser.parse_answer(completion) or ""
        verdicts = await in_sandbox(lambda: judge(problem, code, sandbox, limits)) if code else []
        state["tests_passed"], state["tests"] = sum(verdicts), len(problem.tests)
        return float(sum(verdicts) == len(problem.tests))

    def pass_rate(state: Any) -> float:
        """Share of the tests that passed; tests after a time-out count as failed."""
        return float(state["tests_passed"] / state["tests"])

    def num_test_cases(state: Any) -> float:
        return float(state["tests"])

    return vf.Rubric(funcs=[passed, pass_rate, num_test_cases], weights=[1.0, 0.0, 0.0], parser=parser)


def judge(problem: Problem, code: str, sandbox: Sandbox, limits: Limits) -> list[bool]:
    """One verdict per test. The expected values never enter the sandbox."""
    if problem.function is None:
        stdins = [test.stdin for test in problem.tests]
        outcomes = sandbox.run_programs(code, stdins, limits, prelude=PRELUDE)
        return [
            outcome.status == "ok" and same_output(test.expected_output, outcome.stdout)
            for test, outcome in zip(problem.tests, outcomes, strict=True)
        ]
    arguments = [test.arguments for test in problem.tests]
    calls = sandbox.call_function(code, problem.function, arguments, limits, prelude=PRELUDE)
    return [
        call.status == "ok" and same_value(test.expected_value, call.value)
        for test, call in zip(problem.tests, calls, strict=True)
    ]
