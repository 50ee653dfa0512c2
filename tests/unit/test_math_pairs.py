"""Hard pairs of answers: our checker says what math-verify says when it is called directly, and what is written here.

Where math-verify is wrong the pair says so: a score that is to be compared with other people's has to be wrong with it.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from modal_eval.environments import ensure_environment
from tests.support.data import data_file

ROOT = Path(__file__).resolve().parents[2]
SAME, DIFFERENT = True, False

PAIRS: list[tuple[str, str, bool]] = [
    # (reference, response, verdict) — numbers
    ("1/2", "0.5", SAME),
    ("\\frac{1}{2}", "\\frac12", SAME),
    ("\\frac{1}{2}", "\\dfrac{2}{4}", SAME),
    ("\\frac{1}{3}", "0.333", DIFFERENT),
    ("\\frac{1}{3}", "0.333333", SAME),
    ("3.14", "\\pi", DIFFERENT),
    ("-\\frac{3}{4}", "\\frac{-3}{4}", SAME),
    ("-\\frac{3}{4}", "\\frac{3}{4}", DIFFERENT),
    ("2\\frac{1}{2}", "\\frac{5}{2}", SAME),
    ("1000000", "1,000,000", SAME),
    ("1000000", "10^6", SAME),
    ("1000000", "1{,}000{,}000", SAME),
    ("0.1", ".1", SAME),
    ("7", "7.0", SAME),
    ("7", "07", SAME),
    ("7", "-7", DIFFERENT),
    ("7", "\\text{seven}", DIFFERENT),
    ("3\\times 10^{3}", "3000", SAME),
    ("6.02\\times 10^{23}", "602000000000000000000000", DIFFERENT),  # wrong: floating point
    # roots, powers, constants
    ("\\sqrt{8}", "2\\sqrt{2}", SAME),
    ("\\sqrt{3}", "\\sqrt3", SAME),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", SAME),
    ("\\frac{\\sqrt{2}}{2}", "\\sqrt{2}", DIFFERENT),
    ("2^{10}", "1024", SAME),
    ("\\sqrt[3]{27}", "3", SAME),
    ("\\frac{9}{4}\\pi", "\\frac{9\\pi}{4}", SAME),
    ("e^2", "e^{2}", SAME),
    ("\\log_2 8", "3", SAME),
    ("5!", "120", SAME),
    ("\\binom{5}{2}", "10", SAME),
    # percent, money, units, degrees
    ("50\\%", "50", SAME),
    ("50\\%", "0.5", SAME),
    ("50\\%", "5", DIFFERENT),
    ("\\$18.50", "18.5", SAME),
    ("10\\text{ cm}", "10", SAME),
    ("10\\text{ cm}^2", "10", SAME),
    ("10\\text{ cm}", "10\\text{ m}", SAME),  # wrong: units are dropped
    ("10", "10\\text{ units}", SAME),
    ("90^\\circ", "90", SAME),
    ("90", "90^{\\circ}", SAME),
    ("90^\\circ", "\\frac{\\pi}{2}", DIFFERENT),
    # algebra
    ("x^2+2x+1", "(x+1)^2", SAME),
    ("x^2+2x+1", "x^2+2x-1", DIFFERENT),
    ("\\frac{x+2}{7}", "\\frac{x}{7}+\\frac{2}{7}", SAME),
    ("2-2p", "-2p+2", SAME),
    ("\\sin^2 x", "1-\\cos^2 x", SAME),
    ("x=5", "5", SAME),
    ("5", "x=5", SAME),
    ("x=5", "y=5", DIFFERENT),
    ("y=2x+3", "2x+3", SAME),
    ("2x+3", "y=2x+3", SAME),
    # inequalities, intervals, sets, tuples
    ("[0,1)", "[0,1)", SAME),
    ("[0,1)", "[0,1]", DIFFERENT),
    ("[0,1)", "(0,1)", DIFFERENT),
    ("(-\\infty,0]", "(-\\infty, 0]", SAME),
    ("(-\\infty,0]", "(-\\infty,0)", DIFFERENT),
    ("[0,\\infty)", "x\\ge 0", DIFFERENT),  # wrong: only the reference may be an inequality
    ("x\\ge 0", "[0,\\infty)", SAME),
    ("x\\leq 5", "5\\geq x", SAME),
    ("x<1", "x>1", DIFFERENT),
    ("[-1,0)\\cup(0,1]", "[-1,0) \\cup (0,1]", SAME),
    ("(0,1)\\cup(1,2)", "(0,2)", DIFFERENT),
    ("\\{1,2,3\\}", "\\{3,2,1\\}", SAME),
    ("\\{1,2,3\\}", "\\{1,2\\}", DIFFERENT),
    ("1,2,3", "3,2,1", SAME),
    ("1,-2", "1", DIFFERENT),
    ("(1,2)", "(2,1)", DIFFERENT),
    ("(1,2)", "(1, 2)", SAME),
    ("(3,\\frac{\\pi}{2})", "\\left(3, \\frac{\\pi}{2}\\right)", SAME),
    ("(1,4.5)", "(1,\\frac{9}{2})", SAME),
    ("1\\pm\\sqrt{2}", "1+\\sqrt{2},1-\\sqrt{2}", SAME),
    ("\\pm 2", "2", DIFFERENT),
    ("\\emptyset", "\\{\\}", SAME),
    # matrices, vectors
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", SAME),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", DIFFERENT),
    ("\\begin{pmatrix}1/2\\\\0\\end{pmatrix}", "\\begin{pmatrix}0.5\\\\0\\end{pmatrix}", SAME),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}", DIFFERENT),
    # words, choices, numerals of other bases
    ("\\text{Evelyn}", "Evelyn", SAME),
    ("\\text{Evelyn}", "\\text{Briana}", DIFFERENT),
    ("\\text{(C)}", "C", SAME),
    ("204_5", "204_{5}", SAME),
    ("204_5", "54", DIFFERENT),
    ("3:4", "\\frac{3}{4}", SAME),
    # what nobody can compute, and what is nothing
    ("1", "9^{9^{9^9}}", DIFFERENT),
    ("1", "\\frac{1}{0}", DIFFERENT),
    ("1", "?", DIFFERENT),
    ("1", "\\text{I do not know}", DIFFERENT),
]


def ask(pairs: list[tuple[str, str]], **more: Any) -> dict[str, Any]:
    python = ensure_environment("verifiers-legacy")
    done = subprocess.run(
        [python, ROOT / "tests" / "support" / "math_verdicts.py"], input=json.dumps({"pairs": pairs, **more}),
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reply: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reply


def test_hard_pairs_are_scored_as_math_verify_scores_them() -> None:
    assert len(PAIRS) >= 60
    reply = ask([(reference, response) for reference, response, _ in PAIRS])
    wrong = [
        {"pair": pair, "math-verify": direct, "ours": ours}
        for pair, direct, ours in zip(PAIRS, reply["direct"], reply["ours"], strict=True)
        if not direct == ours == pair[2]
    ]
    assert wrong == []


def jsonl(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode().split("\n") if line.strip()]


def content(text: str) -> str:
    """What a model would have put in the box: the text without its dollar signs or its own box."""
    bare = text.strip()
    for sign in ("$$", "$"):
        if bare.startswith(sign) and bare.endswith(sign) and len(bare) > 2 * len(sign):
            bare = bare[len(sign) : -len(sign)].strip()
            break
    boxed = bare.startswith("\\boxed{") and bare.endswith("}") and bare.count("\\boxed") == 1
    return bare[len("\\boxed{") : -1] if boxed else bare


def is_one_answer(text: str) -> bool:
    bare = content(text)
    return "$" not in bare and "boxed" not in bare and " is " not in bare and len(bare) < 120


READ_AS_TEXT = {
    "test_number_extraction[1000-1 000-1]",
    "test_number_extraction[1000.99-1000,99-1]",
    "test_number_extraction[1,22-1.22-1]",
}
"""Numbers as prose writes them; in a box a blank multiplies and a comma separates."""
OTHER_SETTINGS = {
    "test_latex_notation[$9$-Answer $ \\n 9 \\n $-0]",
    "test_latex_notation[$9$-Answer \\\\( \\n 9 \\n \\\\)-0]",
}
"""Its tests look for LaTeX alone here; by default the plain number counts as well."""
LETTER_E = {"test_string_extraction[$1 - \\\\frac{1}{\\\\mathrm{e}}$-$1 + \\\\frac{1}{\\\\mathrm{e}}$-1]"}
"""1-1/e is called equal to 1+1/e, because the choice "e" is read out of both texts; out of a box it is not."""


def test_math_verifys_own_cases_get_the_recorded_verdicts_but_for_those_that_are_explained() -> None:
    cases = [case for case in jsonl(data_file("labelled/math_cases/math_verify_cases.jsonl")) if not case["options"]]
    bare = [case for case in cases if is_one_answer(case["gold"]) and is_one_answer(case["pred"])]
    assert len(cases) == 248
    assert len(bare) > 100
    reply = ask(
        [(case["gold"], case["pred"]) for case in cases], texts=True,
        ours=[(content(case["gold"]), content(case["pred"])) for case in bare],
    )  # fmt: skip
    direct = {
        case["id"] for case, verdict in zip(cases, reply["direct"], strict=True) if verdict is not case["expected"]
    }
    ours = {case["id"] for case, verdict in zip(bare, reply["ours"], strict=True) if verdict is not case["expected"]}
    assert direct == OTHER_SETTINGS
    assert ours <= READ_AS_TEXT | OTHER_SETTINGS | LETTER_E


def test_hendrycks_cases_get_their_verdicts_but_for_the_order_of_a_list() -> None:
    cases = jsonl(data_file("labelled/math_cases/hendrycks_math_equivalence_cases.jsonl"))
    reply = ask([(case["a"], case["b"]) for case in cases])
    assert reply["ours"] == reply["direct"]
    other = {case["id"] for case, verdict in zip(cases, reply["ours"], strict=True) if verdict is not case["equiv"]}
    assert other == {"test_order", "test_decimals"}


def test_every_recorded_gsm8k_solution_gets_its_label() -> None:
    reference = {row["question"]: row["answer"].rpartition("####")[2] for row in jsonl(data_file("gsm8k/test.jsonl"))}
    recorded = jsonl(data_file("labelled/gsm8k_openai/example_model_solutions.jsonl.gz"))
    cases = [
        (reference[row["question"]].replace(",", ""), said["solution"].rsplit("A:", 1)[-1], said["is_correct"])
        for row in recorded
        for said in row.values()
        if isinstance(said, dict)
    ]
    assert len(cases) == 4 * 1319
    reply = ask([], ours=[pair[:2] for pair in cases])
    assert [case for case, verdict in zip(cases, reply["ours"], strict=True) if verdict is not case[2]] == []


def test_an_answer_that_takes_seconds_keeps_no_other_waiting() -> None:
    quick = [(str(number), f"{2 * number}/2") for number in range(1, 41)]
    reply = ask([], ours=[("1", "9^{9^{9^9}}"), *quick])
    assert reply["ours"] == [False] + [True] * 40
    slow, *others = reply["at"]
    assert max(others) < slow
