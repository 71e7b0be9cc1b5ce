"""Values between two programs that do not trust each other: tagged literals in JSON.

Reading makes builtin values and nothing else: whatever the sender's object does on comparison or
in arithmetic stays where it is. None, bool and str are themselves in JSON; all else is a list that
begins with its tag.
"""

from __future__ import annotations

import builtins
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from decimal import Decimal
    from fractions import Fraction
    from typing import Any

MANY = 100_000
"""Most items that are read from an iterable which is not a literal, e.g. a generator."""


class Other:
    """An object that is not a literal: equal to itself alone. Items and truth can be had."""

    def __init__(self, kind: str, truth: bool, items: list[Any] | None) -> None:
        self.kind, self.truth, self.items = kind, truth, items

    def __bool__(self) -> bool:
        return self.truth

    def __iter__(self) -> Iterator[Any]:
        if self.items is None:
            raise TypeError(f"{self.kind!r} object is not iterable")
        return iter(self.items)

    def __repr__(self) -> str:
        return f"<{self.kind} object>"


WRITERS: dict[type, Callable[[Any], Any]] = {
    int: lambda v: hex(int.__pos__(v)),
    float: lambda v: float.hex(v),
    complex: lambda v: [v.real.hex(), v.imag.hex()],
    bytes: lambda v: v.hex(),
    bytearray: lambda v: v.hex(),
    list: lambda v: [write(x) for x in v],
    tuple: lambda v: [write(x) for x in v],
    set: lambda v: [write(x) for x in v],
    frozenset: lambda v: [write(x) for x in v],
    dict: lambda v: [[write(key), write(x)] for key, x in v.items()],
}
NUMBERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("decimal", "Decimal"): str,
    ("fractions", "Fraction"): lambda v: [hex(v.numerator), hex(v.denominator)],
}
"""As `WRITERS`, of modules that most programs do without: no value is of one never imported."""


def _decimal(text: str) -> Decimal:
    import decimal

    return decimal.Decimal(text)


def _fraction(terms: list[str]) -> Fraction:
    import fractions

    return fractions.Fraction(*(int(x, 16) for x in terms))


READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda v: int(v, 16),
    "float": float.fromhex,
    "complex": lambda v: complex(*map(float.fromhex, v)),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "Decimal": _decimal,
    "Fraction": _fraction,
    "list": lambda v: [read(x) for x in v],
    "tuple": lambda v: tuple(read(x) for x in v),
    "set": lambda v: {read(x) for x in v},
    "frozenset": lambda v: frozenset(read(x) for x in v),
    "dict": lambda v: {read(key): read(x) for key, x in v},
    "other": lambda v: Other(str(v[0]), bool(v[1]), None if v[2] is None else read(v[2])),
}


def write(value: Any) -> Any:
    """A value as JSON's types; subclasses, e.g. named tuples and counters, as what they extend."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    for kind, writer in WRITERS.items():
        if isinstance(value, kind):
            return [kind.__name__, writer(value)]
    for (module, name), writer in NUMBERS.items():
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return [name, writer(value)]
    items = write(_items(value)) if hasattr(value, "__iter__") else None
    return ["other", [type(value).__name__, bool(value), items]]


def _items(value: Any) -> list[Any]:
    found: list[Any] = []
    for item in value:
        if len(found) == MANY:
            raise ValueError(f"{type(value).__name__} has more than {MANY} items")
        found.append(item)
    return found


def read(value: Any) -> Any:
    """The value that `write` was given.

    Raises:
        ValueError, TypeError, LookupError: it is none that `write` makes.
    """
    if value is None or isinstance(value, bool | str):
        return value
    tag, content = value
    return READERS[tag](content)


def error_named(name: str, text: str) -> Exception:
    """The builtin exception of that name, else a RuntimeError.

    An exception that ends an iteration, or is none of the kind Exception, would steer the code that
    it is raised in, and becomes a RuntimeError too.
    """
    kind = getattr(builtins, name, None)
    ends = (StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends):
        try:
            return kind(text)
        except TypeError:  # it takes other arguments
            pass
    return RuntimeError(f"{name}: {text}")
