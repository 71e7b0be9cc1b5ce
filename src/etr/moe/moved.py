"""Names that are importable from where they were, for one release."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that live elsewhere now.

    Args:
        module: its name.
        names: new module of each name.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(names[name]), name)

    return find
