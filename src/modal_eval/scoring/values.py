"""Python values as text that keeps their types, for the way out of the sandbox. Standard library only.

JSON alone makes a list of a tuple, and EvalPlus tells them apart. Text, because whatever unpickles can be made to run
code. What a value is, is found out with `type()` and base-class methods alone, never by asking the value: its class may
have been written to lie.

`encode` gives equal text for values of equal types and contents, except where the order of a dict differs.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import sys
from collections.abc import Callable, Iterator
from typing import Any

MAX_ITEMS = 1_000_000
"""Elements taken from an iterator; one without end must not fill the memory."""
C_ENCODER: Any = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
    None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True
)
LARGE_BYTES = 1 << 18
"""What `marshal` makes of a large value is longer than this."""
SAMPLE = 1000
"""Elements of a large value that are looked at to tell whether it is text alone."""
WIDEST = 32
"""Bytes of the widest number that numpy has."""
LARGEST_ARRAY = 1 << 30
MAX_FRACTION = 1 << 17
"""Hexadecimal digits."""
LARGE = 1 << 62
"""Integers beyond this go as hexadecimal text, for which Python has no limit on digits."""

SELF_EQUAL = "equals everything"
OWN_EQUALITY = "has an equality of its own"


class Foreign:
    """A value that is no plain data: the name of its type, and its elements where it is an iterator or a view."""

    __slots__ = ("forged", "items", "type_name")

    def __init__(self, type_name: str, items: tuple[Any, ...] | None = None, forged: str | None = None) -> None:
        self.type_name = type_name
        self.items = items
        self.forged = forged  # why its equality cannot be trusted

    def __iter__(self) -> Iterator[Any]:
        if self.items is None:
            raise TypeError(f"{self.type_name!r} has no elements")
        return iter(self.items)


def encode(value: Any) -> str:
    """`value` as one line of text. Raises `RecursionError` for a value that contains itself."""
    return to_json(pack(value))


def to_json(packed: Any) -> str:
    """JSON by the C encoder alone: `json.dumps` asks builtins that the code of a stranger may have replaced."""
    return "".join(C_ENCODER(packed, 0))


def encode_or_digest(value: Any) -> str:
    """`encode`, but only a digest of a large value: enough to tell it from another, in a tenth of time and memory.

    The digest says beside the type whether it is `exact`: text alone, for which another digest means another value, where
    2 and 2.0 are equal and written differently. A large value that `marshal` does not take (a set, a subclass, a cycle) is
    written out whole.
    """
    try:
        data = marshal.dumps(value, 2)
    except ValueError:
        return encode(value)
    if len(data) <= LARGE_BYTES:
        return encode(value)
    kind = "exact" if all(type(leaf) in (str, bytes) for leaf in _leaves(value, SAMPLE)) else "loose"
    return f'{{"h":["{hashlib.sha256(data).hexdigest()}","{type(value).__name__}","{kind}"]}}'


def _leaves(value: Any, most: int) -> Iterator[Any]:
    """The first `most` innermost elements; a dict counts as one, because its order does not matter."""
    waiting = [iter((value,))]
    while waiting and most:
        for each in waiting[-1]:
            if type(each) in (list, tuple):
                waiting.append(iter(each))
                break
            most -= 1
            yield each
            if not most:
                break
        else:
            waiting.pop()


def is_digest(text: str) -> bool:
    return text.startswith('{"h"')


def is_loose(text: str) -> bool:
    """Whether it is a digest of a value that another digest may be equal to."""
    return is_digest(text) and text.endswith('"loose"]}')


def decode(text: str) -> Any:
    """The value again. Raises `ValueError` for what `encode` never wrote, and nothing else but for want of room."""
    try:
        packed = json.loads(text)
        return unpack(packed) if "{" in text else packed  # without a tag, JSON says it all
    except (ValueError, RecursionError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"no encoded value: {type(error).__name__}: {error}") from error


def is_value(text: str) -> bool:
    """Whether `encode` can have written `text`; what is too large to be read again may be a value."""
    try:
        decode(text)
    except ValueError:
        return False
    except (RecursionError, MemoryError):
        return True
    return True


def pack(value: Any) -> Any:
    kind = type(value)
    if kind is int:
        return value if -LARGE < value < LARGE else {"i": hex(value)}
    if kind in (str, bool, float, type(None)):
        return value
    if kind is list:
        return [pack(each) for each in value]
    packer = PACKERS.get(kind)
    return packer(value) if packer else pack_other(value, kind)


def _sorted(values: Any) -> list[Any]:
    return sorted((pack(each) for each in values), key=to_json)


PACKERS: dict[type, Callable[[Any], Any]] = {
    tuple: lambda value: {"t": [pack(each) for each in value]},
    set: lambda value: {"s": _sorted(value)},
    frozenset: lambda value: {"f": _sorted(value)},
    dict: lambda value: {"d": [[pack(key), pack(each)] for key, each in value.items()]},
    complex: lambda value: {"c": [value.real, value.imag]},
    bytes: lambda value: {"b": value.hex()},
    bytearray: lambda value: {"ba": value.hex()},
}
BASES: tuple[type, ...] = (bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset, dict)
PLAIN_READERS: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    complex: lambda value: complex(float.__float__(complex.real.__get__(value)), complex.imag.__get__(value)),
    str: str.__str__,
    bytes: lambda value: bytes(bytes.__iter__(value)),
    bytearray: lambda value: bytes(bytearray.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
}
"""How each base type is read without any method that a subclass may have replaced."""
ITERATED = {
    "builtins": {"range", "map", "filter", "zip", "enumerate", "reversed", "generator", "dict_keys", "dict_values",
                 "dict_items", "list_iterator", "tuple_iterator", "set_iterator", "str_iterator", "str_ascii_iterator",
                 "list_reverseiterator", "range_iterator", "dict_keyiterator"},
    "collections": {"deque"},
    "itertools": {"chain", "islice", "takewhile", "dropwhile", "accumulate", "combinations", "permutations", "product"},
}  # fmt: skip


def pack_other(value: Any, kind: type) -> Any:
    name = str(type.__getattribute__(kind, "__qualname__"))
    try:
        module = str(type.__getattribute__(kind, "__module__"))
    except AttributeError:  # made by `type` where no name of a module is known
        module = ""
    if module.partition(".")[0] == "numpy":
        if hasattr(value, "dtype") and hasattr(value, "tolist"):
            return {"np": [str(value.dtype), list(getattr(value, "shape", ())), pack(value.tolist())]}
        return {"o": [f"{module}.{name}", None, None]}
    if kind is getattr(sys.modules.get("fractions"), "Fraction", None):
        return {"fr": [hex(value.numerator), hex(value.denominator)]}
    if kind is getattr(sys.modules.get("decimal"), "Decimal", None):
        return {"de": str(value)}
    base = next((each for each in BASES if issubclass(kind, each)), None)
    forged = _forged(value, kind)
    if base is not None and forged is None:
        return {"u": [f"{module}.{name}", pack(PLAIN_READERS[base](value))]}
    items = None
    if name in ITERATED.get(module, ()) and forged is None:
        items = [pack(each) for each, _ in zip(value, range(MAX_ITEMS), strict=False)]
    return {"o": [f"{module}.{name}", items, forged]}


def _forged(value: Any, kind: type) -> str | None:
    """Whether the value would call itself equal to something that nothing equals, or a base type's equality is replaced."""
    for each in type.__getattribute__(kind, "__mro__"):
        if "__eq__" in vars(each):
            if type(vars(each)["__eq__"]).__name__ in ("wrapper_descriptor", "method_descriptor"):
                return None
            break
    try:
        if kind.__eq__(value, object()) is True:  # type: ignore[call-arg]
            return SELF_EQUAL
    except BaseException:  # noqa: BLE001 - the code of a stranger
        return OWN_EQUALITY
    return OWN_EQUALITY if issubclass(kind, BASES) and not _is_library(each) else None


def _is_library(kind: type) -> bool:
    """Whether a class comes with Python: `Counter` and its like compare as the dicts that they are."""
    module = sys.modules.get(str(vars(kind).get("__module__", "")))
    return module is not None and vars(module).get(kind.__name__) is kind and module.__name__ in ("collections", "enum")


def unpack(packed: Any) -> Any:
    if isinstance(packed, list):
        return [unpack(each) for each in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) != 1:
        raise ValueError(f"{packed!r} is no encoded value")
    ((tag, body),) = packed.items()
    if tag not in UNPACKERS:
        raise ValueError(f"{tag!r} is no tag of an encoded value")
    return UNPACKERS[tag](body)


def _hashed(kind: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, or a `Foreign` where an element had a hash of its own and has none as the list that it is."""
    try:
        return make()
    except TypeError:
        return Foreign(f"{kind} of what has no hash")


def _numpy(body: Any) -> Any:
    """The array, or a `Foreign` where its type says more than its elements do (dates, records)."""
    dtype, shape, packed = body
    value = unpack(packed)
    try:
        import numpy

        wide = numpy.dtype(dtype).itemsize
        if wide <= WIDEST or wide * numpy.array(value, object).size <= LARGEST_ARRAY:
            array = numpy.array(value, dtype=dtype)
            return array.reshape(shape) if shape else array[()]
    except Exception:  # noqa: BLE001, S110 - the type's name and the shape are a stranger's
        pass
    return Foreign(f"numpy {dtype}")


def _fraction(body: Any) -> Any:
    from fractions import Fraction

    if len(body[0]) + len(body[1]) > MAX_FRACTION:
        raise ValueError("reducing a fraction of this length would take hours")
    return Fraction(int(body[0], 16), int(body[1], 16))


def _decimal(body: Any) -> Any:
    from decimal import Decimal

    return Decimal(body)


UNPACKERS: dict[str, Callable[[Any], Any]] = {
    "i": lambda body: int(body, 16),
    "t": lambda body: tuple(unpack(each) for each in body),
    "s": lambda body: _hashed("set", lambda: {unpack(each) for each in body}),
    "f": lambda body: _hashed("frozenset", lambda: frozenset(unpack(each) for each in body)),
    "d": lambda body: _hashed("dict", lambda: {unpack(key): unpack(each) for key, each in body}),
    "c": lambda body: complex(*body),
    "b": bytes.fromhex,
    "ba": bytearray.fromhex,
    "u": lambda body: unpack(body[1]),
    "h": lambda body: Foreign(f"a large {body[1]}"),
    "np": _numpy,
    "fr": _fraction,
    "de": _decimal,
    "o": lambda body: Foreign(body[0], None if body[1] is None else tuple(map(unpack, body[1])), body[2]),
}
