"""Tables of configs by name, and the same configs as text and as plain values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, MutableMapping
from importlib import import_module
from typing import Any, ClassVar, TypeVar

T = TypeVar("T")


class Table(MutableMapping[str, type[T]]):
    """Classes of frozen configs by their `name`, in the order given; fields are options.

    Modules that add rows to tables (`more_rows_in`) are imported when a table is asked for a name
    that it does not have yet, or for all of them: many methods cost nothing until one is wanted.

    Args:
        field: what holds one of them, as errors call it.
        kinds: the classes.
        others: names that stand for no class here, and that errors tell of too.
        wrapped: the option that a bare ``name`` among options means.
    """

    _later: ClassVar[list[str]] = []

    def __init__(
        self,
        field: str,
        kinds: Iterable[Any],
        *,
        others: tuple[str, ...] = (),
        wrapped: str | None = None,
    ) -> None:
        self._rows: dict[str, type[T]] = {kind.name: kind for kind in kinds}
        self.field, self.others, self.wrapped = field, others, wrapped

    @classmethod
    def more_rows_in(cls, module: str) -> None:
        """Name a module whose import adds rows to tables; it is imported when they are wanted."""
        cls._later.append(module)

    def _whole(self) -> dict[str, type[T]]:
        for module in self._later:
            import_module(module)  # of one that is under way, Python returns what there is
        return self._rows

    def __getitem__(self, name: str) -> type[T]:
        return self._rows[name] if name in self._rows else self._whole()[name]

    def __setitem__(self, name: str, kind: type[T]) -> None:
        self._rows[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.field!r}, {self._whole()!r})"

    def add(self, kind: type[T]) -> None:
        """Take in one more class under its `name`.

        Raises:
            ValueError: the name is taken.
        """
        self.refuse_taken(kind)
        self[kind.name] = kind  # type: ignore[attr-defined]

    def refuse_taken(self, kind: Any) -> None:
        """Raise the ValueError of `add` without taking the class in."""
        if kind.name in self or kind.name in self.others:
            owner = self.get(kind.name)
            whose = "" if owner is None else f" by {owner.__module__}.{owner.__qualname__}"
            raise ValueError(f"{self.field} {kind.name!r} is taken{whose}; choose another name")

    def parse(self, text: str, field: str | None = None) -> T:
        """Read ``name`` or ``name:option=value,option=value``; values are JSON, or else text.

        Of what is wrapped, ``wrapped.option=value`` is an option.

        Args:
            field: what errors call it, if not the table's own word.
        Raises:
            ValueError: the name or an option is unknown, or a value is refused.
        """
        name, _, options = text.partition(":")
        values: dict[str, Any] = {"name": name}
        for option in filter(None, options.split(",")):
            key, equals, value = option.partition("=")
            if not equals and not self._wraps(name):
                raise ValueError(
                    f"{field or self.field} option {option!r} in {text!r} must read option=value"
                )
            key, value = (key, value) if equals else (str(self.wrapped), key)
            outer, dot, inner = key.partition(".")
            if key == self.wrapped:
                values.setdefault(key, {})["name"] = value
            elif dot and outer == self.wrapped:
                values.setdefault(outer, {})[inner] = value_of(value)
            else:
                values[key] = value_of(value)
        return self.from_dict(values, field)

    def _wraps(self, name: str) -> bool:
        """Whether a config of the name has the option that a bare one means."""
        fields: Collection[str] = getattr(self.get(name), "__dataclass_fields__", ())
        return self.wrapped in fields

    def from_dict(self, values: dict[str, Any], field: str | None = None) -> T:
        """Inverse of `config_to_dict`.

        Args:
            field: what errors call it, if not the table's own word.
        Raises:
            ValueError: the name or an option is unknown, or a value is refused.
        """
        values = dict(values)
        name = values.pop("name", None)
        check_name(field or self.field, name, self, self.others)
        known = [entry.name for entry in dataclasses.fields(self[name])]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"{field or self.field} {name!r} has no option {', '.join(unknown)}; it has "
                f"{', '.join(known) or 'none'}"
            )
        for key, value in values.items():
            if isinstance(value, dict):
                values[key] = self.from_dict(value, None if key == "wrapped" else key)
        return self[name](**values)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config of a table as plain values with its `name`."""
    values: dict[str, Any] = {"name": config.name}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        values[entry.name] = config_to_dict(value) if dataclasses.is_dataclass(value) else value
    return values


def config_to_text(config: Any) -> str:
    """Inverse of `Table.parse` for a config of plain values; leaves out what is at its default."""
    options = [
        f"{entry.name}={value if isinstance(value, str) else json.dumps(value)}"
        for entry in dataclasses.fields(config)
        if (value := getattr(config, entry.name)) != entry.default
    ]
    return ":".join(filter(None, (config.name, ",".join(options))))


def check_name(field: str, value: Any, known: Collection[str], others: Iterable[str] = ()) -> None:
    """Refuse a name that there is not.

    Args:
        others: names to tell of too, which the caller knows what to do with.
    Raises:
        ValueError: lists those that there are.
    """
    if value not in known:
        names = ", ".join((*others, *known))
        raise ValueError(f"{field}={value!r} is unknown; choose one of {names}")


def value_of(text: str) -> Any:
    """A value as options are written: JSON, or else text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
