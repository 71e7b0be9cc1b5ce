"""Dispatchers: how rows travel to their expert and back."""

from etr.moe.dispatch.permute import Permute
from etr.moe.dispatch.rows import DispatchHandle

DISPATCHERS: dict[str, type[Permute]] = {"permute": Permute}
"""Dispatchers by name."""

__all__ = ["DISPATCHERS", "DispatchHandle", "Permute"]
