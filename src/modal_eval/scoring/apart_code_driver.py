"""Inside the code's sandbox: calls functions of the code as tests elsewhere want them called, and sends out what came of it.

The tests are not here, nor what they expect. A call is the text of (name, arguments, named arguments), an answer the text of
a value or of an exception. What is no plain data stays here and can be named as the argument of a later call.
"""

from __future__ import annotations

import builtins
import contextlib
import os
from typing import Any

from modal_eval.scoring import battery_driver, values

ARITHMETIC = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "divmod", "pow", "matmul", "and", "or", "xor", "lshift", "rshift",
)  # fmt: skip
OPERATORS = (
    *(f"__{side}{name}__" for name in ARITHMETIC for side in ("", "r")),
    "__lt__", "__le__", "__gt__", "__ge__", "__neg__", "__pos__", "__abs__", "__invert__", "__round__", "__trunc__",
    "__floor__", "__ceil__", "__int__", "__float__", "__complex__", "__index__",
)  # fmt: skip
"""With these an object that is no number answers in a number's place."""
MESSAGE_KEPT = 1_000
TYPES = {name: each for name, each in vars(builtins).items() if isinstance(each, type)}


def _pack_type(kind: type) -> Any:
    name = str(type.__getattribute__(kind, "__name__"))
    return {"ty": name} if TYPES.get(name) is kind else values.pack_other(kind, type)


def _pack_iterable(value: Any) -> Any:
    return [values.pack(each) for each in value]


values.PACKERS[type] = _pack_type
values.PACKERS[range] = lambda value: {"ra": _pack_iterable((value.start, value.stop, value.step))}
values.PACKERS[type({}.keys())] = lambda value: {"dk": _pack_iterable(value)}
values.UNPACKERS["ty"] = lambda body: TYPES[body]
values.UNPACKERS["ra"] = lambda body: range(*map(values.unpack, body))
values.UNPACKERS["dk"] = lambda body: dict.fromkeys(map(values.unpack, body)).keys()


class Code(battery_driver.Child):
    """Runs the code and answers the calls, each with arguments of its own, whatever became of those before."""

    def run(self) -> None:
        self.enter()
        self.calls(self.group["inputs"])
        os._exit(0)

    def calls(self, inputs: list[str]) -> None:
        scope: dict[str, Any] = {}
        kept: list[Any] = []
        values.UNPACKERS["name"] = lambda name: look_up(scope, name)
        values.UNPACKERS["ref"] = lambda number: kept[number]
        try:
            exec(compile(self.request["source"], "<code>", "exec"), scope)  # noqa: S102
        except BaseException as error:  # noqa: BLE001 - whatever the code raises is its result
            self.exited(error, SystemExit)
            self.send(failed=type(error).__name__)
            self.end()
            return
        self.send(loaded=True)
        for number, text in enumerate(inputs):
            answer = self.answer(text, scope, kept)
            self.send(call=number, value=values.to_json(answer))
        self.end()

    def answer(self, text: str, scope: dict[str, Any], kept: list[Any]) -> dict[str, Any]:
        number = len(kept)
        kept.append(None)
        try:
            name, arguments, named = values.decode(text)
            function = look_up(scope, name)
            if arguments is not None:
                kept[number] = function(*arguments, **named)
            packed = values.encode(kept[number])
            operators = own_operators(kept[number]) if packed.startswith('{"o"') else []
        except BaseException as error:  # noqa: BLE001
            self.exited(error, SystemExit)
            return {"raised": [type(error).__name__, message_of(error)]}
        self.look_at(packed)
        return {"value": packed, "operators": operators}


def look_up(scope: dict[str, Any], name: str) -> Any:
    if name not in scope:
        raise NameError(f"name {name!r} is not defined")
    return scope[name]


def own_operators(value: Any) -> list[str]:
    """The operators that the code has written for the class of `value`."""
    return [
        name
        for kind in type.__getattribute__(type(value), "__mro__")
        for name, found in vars(kind).items()
        if name in OPERATORS and type(found).__name__ not in ("wrapper_descriptor", "method_descriptor")
    ]


def message_of(error: BaseException) -> str:
    with contextlib.suppress(BaseException):  # the code of a stranger
        return str.__str__(str(error))[:MESSAGE_KEPT]
    return ""


if __name__ == "__main__":
    battery_driver.main(Code)
