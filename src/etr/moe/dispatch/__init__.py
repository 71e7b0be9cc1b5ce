"""Dispatchers: how rows travel to their expert and back. One file each, one line in the table."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from etr.moe.dispatch.all_to_all import AllToAll
from etr.moe.dispatch.all_to_all_padded import AllToAllPadded
from etr.moe.dispatch.base import Dispatcher
from etr.moe.dispatch.chunked import Chunked
from etr.moe.dispatch.dedup import Dedup
from etr.moe.dispatch.group_wise import GroupWise
from etr.moe.dispatch.hierarchical import Hierarchical
from etr.moe.dispatch.permute import Permute
from etr.moe.dispatch.rows import DispatchHandle

DISPATCHERS: dict[str, type[Dispatcher]] = {
    kind.name: kind
    for kind in (Permute, AllToAll, AllToAllPadded, Chunked, GroupWise, Hierarchical, Dedup)
}
"""Dispatchers by name."""


def parse_dispatcher(text: str) -> Dispatcher:
    """Read ``name``, ``name:option=value`` or ``name:wrapped,option=value``.

    For example ``chunked:all_to_all,chunks=4`` or ``chunked:dedup``.

    Raises:
        ValueError: the name or an option is unknown.
    """
    name, _, rest = text.partition(":")
    if name not in DISPATCHERS:
        raise ValueError(
            f"dispatch={name!r} is unknown; choose one of auto, {', '.join(DISPATCHERS)}"
        )
    known = [field.name for field in dataclasses.fields(DISPATCHERS[name])]
    options: dict[str, Any] = {}
    for option in filter(None, rest.split(",")):
        key, equals, value = option.partition("=")
        key, value = (key, value) if equals else ("wrapped", key)
        if key not in known:
            raise ValueError(
                f"dispatcher {name!r} in {text!r} has no option {key}; it has "
                f"{', '.join(known) or 'none'}"
            )
        options[key] = parse_dispatcher(value) if key == "wrapped" else _number(value)
    return DISPATCHERS[name](**options)


def _number(text: str) -> Any:
    """The number that a text holds, else the text: the dispatcher says what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


__all__ = ["DISPATCHERS", "DispatchHandle", "Dispatcher", "Permute", "parse_dispatcher"]
