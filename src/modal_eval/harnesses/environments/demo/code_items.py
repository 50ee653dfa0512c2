"""Tiny functions to write, each with hidden calls and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CodeItem:
    function: str
    signature: str
    task: str
    calls: tuple[tuple[list[Any], Any], ...]


CODE = (
    CodeItem("add", "add(a, b)", "returns the sum of a and b", (([2, 3], 5), ([-1, 1], 0), ([10, -4], 6))),
    CodeItem(
        "is_even",
        "is_even(n)",
        "returns True if the integer n is even, else False",
        (([4], True), ([7], False), ([0], True), ([-3], False)),
    ),
    CodeItem("square", "square(x)", "returns x multiplied by itself", (([5], 25), ([-3], 9), ([0], 0))),
    CodeItem(
        "largest",
        "largest(numbers)",
        "returns the largest number in a list",
        (([[3, 9, 2]], 9), ([[-5, -2]], -2), ([[7]], 7)),
    ),
    CodeItem(
        "reverse_text",
        "reverse_text(text)",
        "returns the text backwards",
        ((["abc"], "cba"), ([""], ""), (["x y"], "y x")),
    ),
    CodeItem(
        "count_vowels",
        "count_vowels(text)",
        "returns how many of the letters a, e, i, o, u the text has, in either case",
        ((["hello"], 2), (["SKY"], 0), (["Anna Otto"], 4)),
    ),
    CodeItem(
        "total",
        "total(numbers)",
        "returns the sum of a list of numbers, 0 for an empty list",
        (([[1, 2, 3]], 6), ([[]], 0), ([[-4, 4]], 0)),
    ),
    CodeItem(
        "is_palindrome",
        "is_palindrome(word)",
        "returns True if the word reads the same backwards",
        ((["level"], True), (["house"], False), (["a"], True)),
    ),
    CodeItem(
        "factorial",
        "factorial(n)",
        "returns the factorial of n; the factorial of 0 is 1",
        (([0], 1), ([5], 120), ([7], 5040)),
    ),
    CodeItem(
        "celsius",
        "celsius(f)",
        "converts degrees Fahrenheit to degrees Celsius",
        (([212], 100), ([32], 0), ([-40], -40)),
    ),
    CodeItem("last_item", "last_item(items)", "returns the last item of a list", (([[1, 2, 3]], 3), ([["a"]], "a"))),
    CodeItem(
        "double_all",
        "double_all(numbers)",
        "returns a new list in which every number is doubled",
        (([[1, 2]], [2, 4]), ([[]], []), ([[-3]], [-6])),
    ),
    CodeItem(
        "evens",
        "evens(numbers)",
        "returns a list of only the even numbers, in their order",
        (([[1, 2, 3, 4]], [2, 4]), ([[5]], []), ([[0, -2]], [0, -2])),
    ),
    CodeItem(
        "word_count",
        "word_count(text)",
        "returns the number of words in a text",
        ((["one two three"], 3), ([""], 0), (["  a   b "], 2)),
    ),
    CodeItem("absolute", "absolute(x)", "returns the absolute value of x", (([-4], 4), ([3], 3), ([0], 0))),
    CodeItem(
        "fizzbuzz",
        "fizzbuzz(n)",
        "returns 'Fizz' if n is divisible by 3, 'Buzz' if by 5, 'FizzBuzz' if by both, and otherwise the number as a string",
        (([3], "Fizz"), ([10], "Buzz"), ([30], "FizzBuzz"), ([7], "7")),
    ),
    CodeItem(
        "second_largest",
        "second_largest(numbers)",
        "returns the second largest of the distinct numbers in a list",
        (([[1, 5, 3]], 3), ([[4, 4, 2]], 2), ([[10, 9]], 9)),
    ),
    CodeItem(
        "unique",
        "unique(items)",
        "returns the items of a list without repetitions, in the order of their first appearance",
        (([[3, 1, 3, 2, 1]], [3, 1, 2]), ([["b", "a", "b"]], ["b", "a"]), ([[]], [])),
    ),
    CodeItem(
        "count_letter",
        "count_letter(text, letter)",
        "returns how often the letter stands in the text",
        ((["banana", "a"], 3), (["sky", "e"], 0)),
    ),
    CodeItem(
        "average",
        "average(numbers)",
        "returns the average of a list of numbers, and 0 for an empty list",
        (([[1, 2, 3]], 2), ([[]], 0), ([[5, 10]], 7.5)),
    ),
    CodeItem(
        "power_of_two",
        "power_of_two(n)",
        "returns True if the positive integer n is a power of two",
        (([1], True), ([8], True), ([6], False), ([12], False)),
    ),
    CodeItem(
        "title_case",
        "title_case(text)",
        "returns the text with the first letter of each word in upper case",
        ((["hello big world"], "Hello Big World"), (["a"], "A")),
    ),
    CodeItem(
        "digits_sum",
        "digits_sum(n)",
        "returns the sum of the digits of a non-negative integer",
        (([123], 6), ([0], 0), ([909], 18)),
    ),
    CodeItem(
        "leap_year",
        "leap_year(year)",
        "returns True if the year is a leap year of the Gregorian calendar",
        (([2000], True), ([1900], False), ([2024], True), ([2023], False)),
    ),
    CodeItem(
        "merge",
        "merge(a, b)",
        "merges two sorted lists into one sorted list",
        (([[1, 4], [2, 3]], [1, 2, 3, 4]), ([[], [5]], [5]), ([[1], [1]], [1, 1])),
    ),
    CodeItem(
        "common",
        "common(a, b)",
        "returns a sorted list of the items that both lists have, each once",
        (([[1, 2, 3, 3], [3, 2, 5]], [2, 3]), ([[1], [2]], [])),
    ),
    CodeItem(
        "run_lengths",
        "run_lengths(text)",
        "returns a list of [letter, count] pairs, one for each run of equal letters in the text",
        ((["aabc"], [["a", 2], ["b", 1], ["c", 1]]), ([""], []), (["zzz"], [["z", 3]])),
    ),
    CodeItem(
        "primes",
        "primes(n)",
        "returns a list of all prime numbers up to and including n",
        (([10], [2, 3, 5, 7]), ([2], [2]), ([1], [])),
    ),
)
