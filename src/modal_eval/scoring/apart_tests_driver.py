"""Inside the tests' sandbox: runs the tests, with what the code in another sandbox answered in place of its functions.

Nothing of the code is here. A call without an answer is noted and gets an `Unknown` that lets the tests go on, so that many
calls are noted at once; tests count only when every call has its answer.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import json
import os
import re
from collections import deque
from collections.abc import Callable
from typing import Any

from modal_eval.scoring import battery_driver, values
from modal_eval.scoring.apart_code_driver import OPERATORS

NOT_PLAIN = re.compile(r'\{"[ou]":')
REFERENCE = re.compile(r'\{"ref":(\d+)\}')
COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
QUESTIONS = (*COMPARISONS, "__bool__", "__len__", "__iter__", "__contains__", "__getitem__", "__call__")
REASON_KEPT = 500
MOST_CALLS = 1_000
"""Noted at once; tests that go on until an answer pleases them would never end."""


class _Later(Exception):  # noqa: N818 - an outcome, not an error
    """An argument that is known only when an earlier call has its answer."""


class Malformed(Exception):  # noqa: N818
    """An answer that was not written by the driver of the code."""


class Unknown:
    """Stands for what a call without an answer will return."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown()


for _name in (*OPERATORS, "__getitem__", "__call__"):
    setattr(Unknown, _name, lambda self, *arguments, **named: Unknown())
for _name in (*COMPARISONS, "__bool__", "__contains__"):
    setattr(Unknown, _name, lambda self, *arguments: True)
for _name in ("__int__", "__index__", "__trunc__", "__floor__", "__ceil__", "__len__", "__hash__"):
    setattr(Unknown, _name, lambda self: 0)
Unknown.__float__ = lambda self: 0.0  # type: ignore[attr-defined]
Unknown.__iter__ = lambda self: iter(())  # type: ignore[attr-defined]


class Opaque:
    """An object that stayed with the code: an argument for a later call, and no answer to anything."""

    def __init__(self, number: int | None, type_name: str, operators: list[str], seen: list[str]) -> None:
        self.number, self.type_name, self.operators, self.seen = number, type_name, operators, seen


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: Opaque, *arguments: Any, **named: Any) -> Any:
        if name in self.operators:
            self.seen.append(f"returned an object that answers {name} itself")
        raise TypeError(f"the code returned a {self.type_name}, which is no plain data")

    return refuse


for _name in (*QUESTIONS, *OPERATORS):
    setattr(Opaque, _name, _refusal(_name))
Opaque.__hash__ = object.__hash__  # type: ignore[method-assign] # a set of them can be read, and equals no other


class Function:
    """A function of the code."""

    def __init__(self, program: Program, name: str) -> None:
        self._program, self.name = program, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._program.ask(self.name, arguments, named)

    __eq__ = __ne__ = __bool__ = _refusal("")
    __hash__ = object.__hash__
    type_name, operators = "function", ()


def _pack_reference(value: Unknown | Opaque) -> Any:
    if value.number is None:
        if isinstance(value, Unknown):
            raise _Later
        raise TypeError(
            f"the tests hand over a part of what the code returned: a {value.type_name}, which is no plain data"
        )
    return {"ref": value.number}


values.PACKERS[Unknown] = values.PACKERS[Opaque] = _pack_reference
values.PACKERS[Function] = lambda function: {"name": function.name}


class Program:
    """The tests, and what is known of the code."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.asked: list[str] = list(job["calls"])
        self.open = False
        """Whether anything that the tests asked has no answer yet."""
        self.seen: list[str] = []
        self.answers = [self._read(number, text) for number, text in enumerate(job["answers"])]
        self.known: dict[str, deque[int]] = {}
        for number, text in enumerate(job["calls"]):
            self.known.setdefault(REFERENCE.sub(self._plain, text), deque()).append(number)

    def _read(self, number: int, text: str) -> Any:
        """A value, or the exception that the call raised."""

        def opaque(body: Any) -> Any:
            name, items, _ = body
            if items is None:
                return Opaque(number if top else None, str(name), operators if top else [], self.seen)
            elements = [values.unpack(each) for each in items]
            if name == "collections.deque":
                return deque(elements)
            return dict(enumerate(elements)).values() if name == "builtins.dict_values" else iter(elements)

        values.UNPACKERS["o"] = opaque
        try:
            said = json.loads(text)
            if "raised" in said:
                return Raised(*map(str, said["raised"]))
            packed, operators = said["value"], list(map(str, said["operators"]))
            top = packed.startswith('{"o"') and packed.count('{"o"') == 1
            return values.decode(packed)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Malformed(str(error)) from error

    def _plain(self, found: re.Match[str]) -> str:
        """A value in place of a reference to it: by value is how the tests will hand it over, now that it is known."""
        number = int(found[1])
        if number >= len(self.answers) or isinstance(self.answers[number], Raised):
            return found[0]
        return values.encode(self.answers[number])

    def ask(self, name: str, arguments: tuple[Any, ...] | None, named: dict[str, Any]) -> Any:
        try:
            text = values.encode((name, arguments, named))
        except _Later:
            self.open = True
            return Unknown()
        if NOT_PLAIN.search(text):
            raise TypeError(f"the tests call {name} with what is no plain data")
        if waiting := self.known.get(text):
            number = waiting.popleft()
            if number < len(self.answers):
                answer = self.answers[number]
                if isinstance(answer, Raised):
                    raise answer.error
                return answer
        else:
            if len(self.asked) - len(self.job["calls"]) >= MOST_CALLS:
                raise RuntimeError(f"the tests make more than {MOST_CALLS} calls before they look at an answer")
            self.asked.append(text)
            number = len(self.asked) - 1
        self.open = True
        return Unknown(number)

    def run(self) -> dict[str, Any]:
        if "random" in self.job["source"]:
            importlib.import_module("random").seed(self.job["seed"])
        scope: dict[str, Any] = {}
        reason = None
        try:
            exec(compile(self.job["given"], "<given>", "exec"), scope)  # noqa: S102
            scope |= {name: Function(self, name) for name in self.job["names"]}
            for name in self.job["modules"]:
                self.ask(name, None, {})  # of the standard library, but only where the code has imported it
                scope[name] = importlib.import_module(name)
            scope[self.job["open_name"]] = lambda: self.open
            exec(compile(self.job["source"], "<tests>", "exec"), scope)  # noqa: S102
        except BaseException as error:  # noqa: BLE001 - whatever ends the tests early is why they are not passed
            reason = f"{type(error).__name__}: {error}".removesuffix(": ")[:REASON_KEPT]
        return {"open": self.open, "calls": self.asked, "reason": reason, "tampered": self.seen}


class Raised:
    """An exception of the code, as Python's own of that name where there is one."""

    def __init__(self, name: str, message: str) -> None:
        kind = getattr(builtins, name, None)
        self.error: Exception = RuntimeError(f"{name}: {message}")
        # The end of an iteration would end one of the tests' own, and with it what they still have to ask.
        if isinstance(kind, type) and issubclass(kind, Exception) and kind not in (StopIteration, StopAsyncIteration):
            with contextlib.suppress(TypeError):  # one that takes other arguments
                self.error = kind(message)


class Tests(battery_driver.Child):
    """Runs the one job that is this group's input."""

    def run(self) -> None:
        job = json.loads(self.group["inputs"][0])
        self.enter()
        self.send(loaded=True)
        try:
            said = Program(job).run()
        except Malformed as error:
            said = {"malformed": str(error)}
        self.send(call=0, value=values.to_json(said))
        self.end()
        os._exit(0)


if __name__ == "__main__":
    battery_driver.main(Tests)
