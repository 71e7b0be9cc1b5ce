"""What the line under each field of a config says, at run time."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
from typing import TypeVar

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
            default = "" if _required(field) else f" = {_default(field)!r}"
            lines.append(f"    {field.name}{default}")
            lines += textwrap.wrap(notes.get(field.name, ""), 84, initial_indent=" " * 8,
                                   subsequent_indent=" " * 8)  # fmt: skip
        return "\n".join(lines)


def _required(field: dataclasses.Field[object]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[object]) -> object:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
