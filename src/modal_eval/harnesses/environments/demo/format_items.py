"""Instructions about the form of an answer, each with an exact check: Python decides, no model does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

Check = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class FormatItem:
    prompt: str
    check: Check


def words(text: str) -> list[str]:
    """Words as people count them: `well-known` and `don't` are one."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text)


def exactly(count: int) -> Check:
    return lambda text: len(words(text)) == count


def at_most(count: int) -> Check:
    return lambda text: 0 < len(words(text)) <= count


def upper(text: str) -> bool:
    return any(map(str.isalpha, text)) and text == text.upper()


def lower(text: str) -> bool:
    return any(map(str.isalpha, text)) and text == text.lower()


def bullets(count: int) -> Check:
    """Exactly `count` lines that begin with a bullet."""
    return lambda text: len(re.findall(r"^[ \t]*[-*•][ \t]+\S", text, re.MULTILINE)) == count


def numbered(count: int) -> Check:
    """Lines numbered 1 to `count`, in order, and no more."""
    return lambda text: (
        re.findall(r"^[ \t]*(\d+)[.)][ \t]+\S", text, re.MULTILINE) == [str(number) for number in range(1, count + 1)]
    )


def json_with(*keys: str) -> Check:
    """Nothing but a JSON object that has exactly these keys; a code fence around it is allowed."""

    def check(text: str) -> bool:
        bare = re.sub(r"^```(?:json)?\s*\n(.*)\n```$", r"\1", text, flags=re.DOTALL)
        try:
            value = json.loads(bare)
        except ValueError:
            return False
        return isinstance(value, dict) and set(value) == set(keys)

    return check


def contains(*parts: str) -> Check:
    return lambda text: all(part.lower() in text.lower() for part in parts)


def without(part: str) -> Check:
    return lambda text: len(text) > 20 and part.lower() not in text.lower()


def starts(part: str) -> Check:
    return lambda text: text.startswith(part)


def ends(part: str) -> Check:
    return lambda text: text.endswith(part)


def equals(*answers: str) -> Check:
    return lambda text: text in answers


def wrapped(left: str, right: str) -> Check:
    return lambda text: len(text) > len(left + right) and text.startswith(left) and text.endswith(right)


def separated(separator: str, count: int) -> Check:
    """`count` non-empty parts on one line."""
    return lambda text: "\n" not in text and len([part for part in text.split(separator) if part.strip()]) == count


def lines(count: int) -> Check:
    return lambda text: len([line for line in text.splitlines() if line.strip()]) == count


def sentences(count: int) -> Check:
    return lambda text: len(re.findall(r"[.!?]+(?=\s|$)", text)) == count


FORMAT = (
    FormatItem("Answer with exactly one word: what colour is the sky on a clear day?", exactly(1)),
    FormatItem(
        "Answer with one word only, yes or no: is fire hot?",
        equals("Yes", "No", "yes", "no", "Yes.", "No.", "yes.", "no."),
    ),
    FormatItem(
        "Write the sentence 'the cat sleeps' in capital letters. Answer with the sentence only.",
        equals("THE CAT SLEEPS", "THE CAT SLEEPS.", "'THE CAT SLEEPS'", '"THE CAT SLEEPS"'),
    ),
    FormatItem("Repeat this word and nothing else: banana", equals("banana", "Banana", "banana.", "Banana.")),
    FormatItem("Write exactly three bullet points about dogs. Begin each with '- '.", bullets(3)),
    FormatItem("Give exactly five bullet points with names of fruits. Begin each with '- '.", bullets(5)),
    FormatItem("Write a numbered list of exactly four animals.", numbered(4)),
    FormatItem("Write a numbered list with exactly three steps for making tea.", numbered(3)),
    FormatItem(
        'Answer with a JSON object only that has the keys "name" and "age", for a person of your invention.',
        json_with("name", "age"),
    ),
    FormatItem(
        'Give a JSON object with the keys "city" and "country" for Paris. No other text.', json_with("city", "country")
    ),
    FormatItem("Write one sentence about the sea in all capital letters.", upper),
    FormatItem("Write one sentence about winter in lowercase letters only, without any capital letter.", lower),
    FormatItem("Describe a tree in at most ten words.", at_most(10)),
    FormatItem("Describe the moon in at most fifteen words.", at_most(15)),
    FormatItem("Write a sentence about books without using a comma.", without(",")),
    FormatItem("Write two sentences about rain without using a comma.", without(",")),
    FormatItem("Write a sentence that contains the words 'river' and 'stone'.", contains("river", "stone")),
    FormatItem(
        "Write a sentence that contains the words 'bread', 'morning' and 'window'.",
        contains("bread", "morning", "window"),
    ),
    FormatItem("Begin your answer with the word 'Certainly' and tell me what a clock is for.", starts("Certainly")),
    FormatItem("Tell me in one or two sentences what a bridge is. End your answer with the word END.", ends("END")),
    FormatItem(
        "Give a title for a story about a lost key. Put the title in double angular brackets, like <<title>>, and write nothing else.",
        wrapped("<<", ">>"),
    ),
    FormatItem("Write a greeting. Your whole answer must be inside double quotation marks.", wrapped('"', '"')),
    FormatItem("Name three colours on one line, separated by commas, and nothing else.", separated(",", 3)),
    FormatItem("Name four days of the week on one line, separated by semicolons, and nothing else.", separated(";", 4)),
    FormatItem("Write exactly two sentences about the sun.", sentences(2)),
    FormatItem("Write exactly one sentence about bees.", sentences(1)),
    FormatItem("Write a poem of exactly two lines about snow.", lines(2)),
    FormatItem("What is 5 plus 3? Answer with the number only.", equals("8")),
)
