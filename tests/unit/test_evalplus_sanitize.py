"""The code in an answer, found as EvalPlus finds it: against its own way of trying every window."""

import ast

from hypothesis import given, settings
from hypothesis import strategies as st

from modal_eval.harnesses.adapters.evalplus_sanitize import longest_code

LINES = [
    "def f(x):", "    return x", "    if x:", "        y = [1,", "             2]", "    else:", "", "   ", "Here's the code:", "```python",
    "```", "x = 1", "text", "'''", '"""doc', "f(a, b", ")", "print(f'{x}')", "y = f'{a b}'", "import math", "@cache", "class A:", "    pass",
    "for i in range(3):", "\tpass", "z = (1 +", "2)", "try:", "except ValueError:", "x = \\", "It returns 3.", "# a remark", "lambda:", "return 4",
    "    '''half", "1 = x", "a, *b = c", "match x:", "    case 1:", "async def g():", "    await f()", "def f(x): return (yield)", "]",
]  # fmt: skip


def parses(text):
    try:
        ast.parse(text)
    except (SyntaxError, MemoryError):
        return False
    return True


def every_window(text):
    """All pairs of lines, the longest that parses and came first."""
    lines = text.split("\n")
    best, most = (0, 0), 0
    for start in range(len(lines)):
        for end in range(start + 1, len(lines)):
            window = lines[start : end + 1]
            count = sum(1 for line in window if line.strip())
            if count > most and parses("\n".join(window)):
                best, most = (start, end), count
    return "\n".join(lines[best[0] : best[1] + 1])


@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=14).map("\n".join))
@settings(max_examples=1500, deadline=None)
def test_the_code_found_is_that_of_trying_every_window(text):
    assert longest_code(text) == every_window(text)


def test_code_in_the_middle_of_a_long_talk_is_found():
    talk = [f"Let's see, step {number}: we'd better count (at least" for number in range(400)]
    code = ["def f(x):", "    y = x + 1", "    return y"]
    assert longest_code("\n".join([*talk, "```python", *code, "```", *talk])) == "\n".join(code)
