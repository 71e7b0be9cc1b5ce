"""Dispatchers: how rows travel to their expert and back. One file each, one line in the table."""

from __future__ import annotations

from etr.moe.dispatch.all_to_all import AllToAll
from etr.moe.dispatch.all_to_all_padded import AllToAllPadded
from etr.moe.dispatch.base import Dispatcher
from etr.moe.dispatch.chunked import Chunked
from etr.moe.dispatch.dedup import Dedup
from etr.moe.dispatch.group_wise import GroupWise
from etr.moe.dispatch.hierarchical import Hierarchical
from etr.moe.dispatch.permute import Permute
from etr.moe.rows import DispatchHandle
from etr.moe.table import Table

DISPATCHERS: Table[Dispatcher] = Table(
    "dispatch",
    (Permute, AllToAll, AllToAllPadded, Chunked, GroupWise, Hierarchical, Dedup),
    others=("auto",),
    wrapped="wrapped",
)
"""Dispatchers by name. Their texts may name one to wrap, as in ``chunked:all_to_all,chunks=4``."""

parse_dispatcher = DISPATCHERS.parse

__all__ = ["DISPATCHERS", "DispatchHandle", "Dispatcher", "Permute", "parse_dispatcher"]
