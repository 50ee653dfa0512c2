"""`code_eval` with walls: lm-eval's code tasks run what the model wrote through this, in our sandbox.

They take the metric from the Hub, whose version runs the code in a process of its own without walls, and takes a program
that ends itself early with status 0 for one that passed. Here a program passes only when it has come to its end, behind the
last test, and says so with a word that is made for it; and when the same program does not also pass a test that nothing can pass.
"""

from __future__ import annotations

import ast
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import evaluate

from modal_eval.errors import SandboxError
from modal_eval.harnesses.adapters.common import SetupError
from modal_eval.metrics import pass_at_k
from modal_eval.scoring.choice import make_sandbox
from modal_eval.scoring.sandbox import Limits

Program = tuple[str, str]
"""(what the model wrote, the tests)."""
LIMITS = Limits()
"""CPU time decides, not the 3 s by the clock of the original: a busy machine changes no verdict."""


class CodeEval:
    """The metric `code_eval`: pass@k over programs that are run in the sandbox."""

    def __init__(self, backend: str, workers: int | None) -> None:
        try:
            self._sandbox = make_sandbox(backend)
        except SandboxError as error:
            raise SetupError(str(error)) from error
        self._workers = workers or self._sandbox.at_once
        self._verdicts: dict[Program, bool | Exception] = {}
        self._noted: dict[Program, None] | None = None
        self.loaded = False
        """Whether a task has asked for the metric."""

    def compute(
        self, references: list[str], predictions: list[list[str]], k: list[int] | None = None, **_: Any
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k for each k up to the number of candidates, and whether each candidate passed.

        A test's candidates are run with the test below them. Raises what kept the sandbox from running one: that is no
        wrong answer.
        """
        rows = [
            [self._passed((candidate, test)) for candidate in candidates]
            for test, candidates in zip(references, predictions, strict=True)
        ]
        shares = {
            f"pass@{each}": sum(pass_at_k(len(row), sum(row), each) for row in rows) / len(rows)
            for each in k or [1, 10, 100]
            if all(len(row) >= each for row in rows)
        }
        return shares, {at: [(i, {"passed": passed}) for i, passed in enumerate(row)] for at, row in enumerate(rows)}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Only note what is to be run, and run all of it side by side at the end; the metric is 0 meanwhile."""
        self._noted = {}
        try:
            yield
            noted = list(self._noted)
        finally:
            self._noted = None
        with ThreadPoolExecutor(self._workers) as pool:
            self._verdicts.update(zip(noted, pool.map(self._try, noted), strict=True))

    def _passed(self, program: Program) -> bool:
        if self._noted is not None:
            self._noted[program] = None
            return False
        verdict = self._verdicts[program] if program in self._verdicts else self._try(program)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    def close(self) -> None:
        """Give back what the sandbox holds elsewhere."""
        self._sandbox.close()

    def _try(self, program: Program) -> bool | Exception:
        try:
            return self.run(*program)
        except Exception as error:  # noqa: BLE001 - raised again where the score is asked for
            return error

    def run(self, candidate: str, test: str) -> bool:
        """Whether `candidate` passes `test`, and does not pass a test that nothing can pass."""
        if not self._comes_to_its_end(candidate, test):
            return False
        impossible = impossible_test(test)
        return impossible is None or not self._comes_to_its_end(candidate, impossible)

    def _comes_to_its_end(self, candidate: str, test: str) -> bool:
        word = secrets.token_hex(16)
        last = f"__import__('builtins').print({word!r})"
        (outcome,) = self._sandbox.run_programs(f"{candidate}\n{test}\n{last}\n", [""], LIMITS)
        return outcome.status == "ok" and word in outcome.stdout.splitlines()


def impossible_test(test: str) -> str | None:
    """`test` with a fresh object in place of each value that it expects; nothing where it expects none with `==`.

    No value is equal to a fresh object. What passes all the same says that it is equal to everything, or has found the last
    line and run it by itself.
    """
    tree = ast.parse(test)
    expectations = [
        node.test
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Compare) and isinstance(node.test.ops[0], ast.Eq)
    ]
    for compared in expectations:
        compared.comparators[0] = ast.parse("type('', (), {})()", mode="eval").body
    return ast.unparse(tree) if expectations else None


@contextmanager
def sandboxed_code_eval(metric: CodeEval) -> Iterator[None]:
    """Give `metric` to tasks that ask for `code_eval`, while they are loaded."""
    load = evaluate.load

    def load_ours(path: str, *args: Any, **kwargs: Any) -> Any:
        if path != "code_eval":
            return load(path, *args, **kwargs)
        metric.loaded = True
        return metric

    evaluate.load = load_ours
    try:
        yield
    finally:
        evaluate.load = load
