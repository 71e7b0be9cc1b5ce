"""Watching what the MoE layers of a model decide while it runs: one way for every observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from etr.moe.collector import moe_layers
from etr.moe.routing import Routing, Selection

if TYPE_CHECKING:
    from etr.moe.layer import MoE


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What one MoE layer did with its tokens in one forward.

    Args:
        layer: the layer.
        x: its input, [T, H]; detached.
        routing, selection: over the same T tokens, with whatever gradient they have.
    """

    layer: MoE
    x: Tensor
    routing: Routing
    selection: Selection


Watcher = Callable[[LayerView], None]
"""Called by a layer once its experts have selected, before they run."""


@contextmanager
def watch(model: nn.Module, see: Callable[[int, LayerView], None]) -> Iterator[None]:
    """Call ``see(place, view)`` whenever a MoE layer of `model` has selected.

    A layer that is run again in the backward pass (activation checkpointing) is seen again.

    Args:
        model: holds MoE layers, which may be watched by several at once.
        see: takes the layer's place among `moe_layers(model)` and what the layer did.
    """
    watched = [
        (layer, partial(see, place))  # an object of its own, so that only it is removed
        for place, layer in enumerate(moe_layers(model))
    ]
    for layer, watcher in watched:
        layer.watchers.append(watcher)
    try:
        yield
    finally:
        for layer, watcher in watched:
            layer.watchers[:] = [other for other in layer.watchers if other is not watcher]
