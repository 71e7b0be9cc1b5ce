"""Options from config dataclasses, by tyro."""

from __future__ import annotations

from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(kind: type[T], verb: str, arguments: list[str]) -> T:
    """Read a dataclass from the command line; nested fields are flat options."""
    name = f"etr {verb}"
    return tyro.cli(kind, prog=name, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
