"""Types of config fields, checked when a config is made: values also come from files and text."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}


def check_types(config: Any) -> None:
    """Refuse values that are not of their field's annotated type; call it in `__post_init__`.

    An integer may stand for a float, but True for neither.

    Raises:
        ValueError: names the field, its value and what it must be.
    """
    hints = _hints(type(config))  # type: ignore[arg-type]  # a class is hashable
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if not _fits(value, hint):
            raise ValueError(f"{field.name}={value!r} must be {_words(hint)}")


def meanings(text: str, field: str) -> list[int]:
    """Read ``0+1+0+2``, what each choice means; none for an empty text.

    Args:
        field: what holds it, for errors.
    Raises:
        ValueError: the text cannot be read, or leaves a number out.
    """
    words = text.split("+") if text else []
    if not all(word.isdigit() for word in words) or set(map(int, words)) != set(
        range(len(set(words)))
    ):
        raise ValueError(
            f"{field}={text!r} must be a number for each choice joined by +, of which none "
            "between is left out, e.g. 0+1+0+2"
        )
    return [int(word) for word in words]


def check_count(found: list[int], num_experts: int, what: str) -> None:
    """Refuse meanings of another number of choices than there are.

    Args:
        found: what `meanings` read; none for each its own.
        what: what errors call it.
    Raises:
        ValueError: says how many there are.
    """
    if found and len(found) != num_experts:
        raise ValueError(f"{what} names {len(found)} choices; there are num_experts={num_experts}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    """Types of a class's fields; kept, since each annotation is compiled to find them."""
    return typing.get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(x, inner[0]) for x in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if isinstance(hint, type):
        return isinstance(value, hint)
    return True


def _words(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return ", or ".join(_words(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple:
        return f"a sequence whose items are each {_words(inner[0])}"
    if hint is types.NoneType:
        return "None"
    return WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"
