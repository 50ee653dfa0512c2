"""MATH as `math_qwen`: answers in a box or after "The answer is", compared by math-verify. Plain lm-eval can load this too."""

from __future__ import annotations

import re
from typing import Any

from math_verify import parse, verify
from math_verify.errors import TimeoutException

SECONDS = 5
"""math-verify's limit for reading one answer and for comparing two; a tower of powers would take for ever."""
LONGEST_ANSWER = 10_000
"""Characters. A longer "answer" is a box that was never closed, or a loop."""
SAID = re.compile(r"[Tt]he (?:final )?answer is:?\s*(.+?)(?=\.\s|\.?$|\n)", re.MULTILINE)


def process_docs(dataset: Any) -> Any:
    """Add the reference answer: what stands in the solution's last box."""
    return dataset.map(lambda doc: {"answer": last_boxed(doc["solution"]) or ""})


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`math_verify`: the answer is equal to the reference; `has_answer`: there is one at all."""
    answer = find_answer(results[0])
    return {"math_verify": float(equal(doc["answer"], answer)), "has_answer": float(bool(answer))}


def find_answer(text: str) -> str:
    """What stands in the last `\\boxed{}`, else after the last "The answer is"; nothing where there is neither."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    said = SAID.findall(text)
    return said[-1].strip().strip("$").strip() if said else ""


def last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}` that is closed; `\\boxed 5` counts too, as in MATH's own solutions."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            if rest and not rest.isspace():
                return re.split(r"[\s$.]", rest, maxsplit=1)[0]
            continue
        depth = 0
        for at, letter in enumerate(rest):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return rest[1:at]
    return None


def equal(reference: str, answer: str) -> bool:
    """Whether both mean the same, as math-verify sees it; what it cannot read, or not in time, is not the answer.

    Only for the main thread: math-verify measures its time with signals.
    """
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    if answer == reference:
        return True
    try:
        gold = parse(f"\\boxed{{{reference}}}", parsing_timeout=SECONDS)
        said = parse(f"\\boxed{{{answer}}}", parsing_timeout=SECONDS)
        return bool(verify(gold, said, timeout_seconds=SECONDS))
    except (Exception, TimeoutException):  # noqa: BLE001 - what cannot be read as mathematics is not the answer
        return False


def list_fewshot_samples() -> list[dict[str, str]]:
    """Four worked examples, written for this project: they reason, and end in a box."""
    return [
        {
            "problem": "A garden is a rectangle with a perimeter of 34 metres. Its length is 5 metres more than its "
            "width. What is its area in square metres?",
            "solution": "Let the width be $w$ metres, so that the length is $w + 5$ metres. The perimeter is "
            "$2(w + w + 5) = 4w + 10$, and it is 34, so $4w = 24$ and $w = 6$. The length is $6 + 5 = 11$, and the area "
            "is $6 \\cdot 11 = 66$ square metres. The answer is $\\boxed{66}$.",
            "few_shot": "1",
        },
        {
            "problem": "Two fair six-sided dice are rolled. What is the probability that the product of the two numbers "
            "is odd?",
            "solution": "A product is odd only when both factors are odd. Each die shows an odd number (1, 3 or 5) with "
            "probability $\\frac{3}{6} = \\frac{1}{2}$. The dice are independent, so both are odd with probability "
            "$\\frac{1}{2} \\cdot \\frac{1}{2} = \\frac{1}{4}$. The answer is $\\boxed{\\frac{1}{4}}$.",
            "few_shot": "1",
        },
        {
            "problem": "Find the remainder when $7^{50}$ is divided by $5$.",
            "solution": "Since $7 \\equiv 2 \\pmod 5$, we look at powers of 2: $2^1 = 2$, $2^2 = 4$, $2^3 \\equiv 3$ and "
            "$2^4 \\equiv 1 \\pmod 5$, so they repeat every four steps. As $50 = 4 \\cdot 12 + 2$, "
            "$7^{50} \\equiv 2^2 = 4 \\pmod 5$. The answer is $\\boxed{4}$.",
            "few_shot": "1",
        },
        {
            "problem": "For which real numbers $x$ is $\\sqrt{x + 3} + \\frac{1}{\\sqrt{4 - x}}$ defined? Give the answer in "
            "interval notation.",
            "solution": "The first root needs $x + 3 \\ge 0$, so $x \\ge -3$. The second root stands in a denominator, so "
            "it has to be positive: $4 - x > 0$, so $x < 4$. Both hold for $-3 \\le x < 4$. The answer is "
            "$\\boxed{[-3, 4)}$.",
            "few_shot": "1",
        },
    ]
