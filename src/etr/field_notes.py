"""What the line under each field of a config says, at run time."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from typing import Any, TypeVar

T = TypeVar("T")


@functools.cache
def field_notes(kind: type) -> dict[str, str]:
    """The note under each field of a dataclass, those of its bases too; none without its source."""
    notes: dict[str, str] = {}
    for owner in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # made in a running program
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            match text:
                case ast.Expr(value=ast.Constant(value=str(said))):
                    notes[field.target.id] = " ".join(said.split())
    return notes


def default_of(field: dataclasses.Field[Any]) -> Any:
    """What a dataclass's field holds where nothing is given; `MISSING` where something must be."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def documented(kind: type[T]) -> type[T]:
    """Decorate a dataclass so that ``help(kind)`` says what each field means."""
    kind.__doc__ = _FieldDocs(kind.__doc__ or "")  # type: ignore[assignment]
    return kind


class _FieldDocs:
    """A docstring that has the notes of its class's fields when it is read, and not at import."""

    def __init__(self, summary: str) -> None:
        self.summary = summary

    def __get__(self, instance: object, owner: type) -> str:
        lines = [self.summary, "", "Fields:"]
        notes = field_notes(owner)
        for field in dataclasses.fields(owner):
            default = default_of(field)
            shown = "" if default is dataclasses.MISSING else f" = {default!r}"
            lines.append(f"    {field.name}{shown}")
            lines += [f"        {line}" for line in textwrap.wrap(notes.get(field.name, ""), 76)]
        return "\n".join(lines)
