"""Watching what the MoE layers of a model decide while it runs: one way for every observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from etr.moe.layers import moe_layers
from etr.moe.view import LayerView, Watcher

__all__ = ["LayerView", "Watcher", "watch"]


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
