"""Descriptions from JSON or TOML files: frozen dataclasses whose names say the unit of each value.

The unit is read off the end of a field's name: `memory_bytes`, `latency_seconds`, `kept_share`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from etr.moe.checked import check_types

T = TypeVar("T")
KNOWN = Path(__file__).with_name("known")
"""Descriptions that come with the library: models and clusters."""
UNITS = {
    "_flops_per_second": "floating-point operations per second",
    "_bytes_per_second": "bytes per second",
    "_seconds": "seconds",
    "_bytes": "bytes",
    "_flops": "floating-point operations",
    "_share": "a share between 0 and 1",
}
MAY_BE_ZERO = "may_be_zero"
"""Key of a field's metadata: a whole number that may be 0."""


def zero_or_more(default: int = 0) -> Any:
    """A field that holds a whole number of at least 0."""
    return dataclasses.field(default=default, metadata={MAY_BE_ZERO: True})


def unit_of(name: str) -> str:
    """The unit of a field, in words; "a number" where its name states none."""
    return next((unit for end, unit in UNITS.items() if f"_{name}".endswith(end)), "a number")


def check_units(described: Any) -> None:
    """Refuse values that their unit does not allow; a dataclass's `__post_init__` calls it.

    Raises:
        ValueError: names the field, its value and its unit.
    """
    check_types(described)
    for field in dataclasses.fields(described):
        value, least = getattr(described, field.name), 0 if field.metadata else 1
        if "int" in str(field.type) and value is not None and value < least:
            raise ValueError(f"{field.name}={value!r} must be a whole number of at least {least}")
        if "float" in str(field.type) and isinstance(value, int | float):
            _check_number(field.name, value)


def _check_number(name: str, value: float) -> None:
    unit = unit_of(name)
    if math.isnan(value):
        raise ValueError(f"{name}={value!r} must be a number, in {unit}")
    rate = name.endswith("_per_second")
    if value < 0 or (rate and value == 0) or (name.endswith("_share") and value > 1):
        how = "positive, in " if rate else "" if name.endswith("_share") else "at least 0, in "
        raise ValueError(f"{name}={value!r} must be {how}{unit}")


def read_described(kind: type[T], source: str | Path) -> T:
    """A description by the name of one that comes with the library, or from a file.

    Args:
        kind: its dataclass.
        source: such a name, or the path of a file that ends in .json or .toml.
    Raises:
        FileNotFoundError: there is neither.
        ValueError: not JSON or TOML, or a key is missing, not known or wrong; the message names
            file, key and unit.
    """
    path = Path(source)
    if not path.suffix:
        path = KNOWN / f"{kind.__name__.lower()}-{source}.toml"
    if not path.is_file():
        there = ", ".join(known(kind))
        raise FileNotFoundError(f"{str(source)!r} is not a file; those with a name are {there}")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    return described(kind, values, path.name)


def known(kind: type) -> list[str]:
    """Names of the descriptions of a kind that come with the library."""
    prefix = f"{kind.__name__.lower()}-"
    return sorted(path.stem.removeprefix(prefix) for path in KNOWN.glob(f"{prefix}*.toml"))


def described(kind: type[T], values: Any, where: str) -> T:
    """A dataclass from plain values.

    Args:
        kind: the dataclass.
        values: of a file.
        where: name of the file and of the part of it, for errors.
    Raises:
        ValueError: names what is wrong, with its unit.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be a table of keys, not {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is not a key; the keys are {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{where}: {name} is missing ({_what(name, hints[name])})")
    try:
        made = {name: _value(hints[name], v, name, where) for name, v in values.items()}
        return kind(**made)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from error


def _what(name: str, hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "a table of keys"
    return {str: "a text", bool: "true or false", int: "a whole number"}.get(hint, unit_of(name))


def _value(hint: Any, value: Any, name: str, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return described(typing.cast(type, hint), value, f"{where}: {name}")
    if isinstance(hint, types.UnionType):
        hint = next(part for part in hint.__args__ if part is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: {name}={value!r} must be a list")
        return tuple(_value(hint.__args__[0], part, name, where) for part in value)
    wanted = (int, float) if hint is float else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}: {name}={value!r} must be {_what(name, hint)}")
    return float(value) if hint is float else value
