"""Watching what the MoE layers of a model decide while it runs: one way for every observer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from etr.moe.experts import EXPERT_BACKENDS, ExpertParams, activate
from etr.moe.layer import MoE
from etr.moe.layers import moe_layers
from etr.moe.routing import Routing, Selection
from etr.moe.view import LayerView, Watcher

__all__ = ["LayerView", "Watcher", "expert_neurons", "expert_rows", "watch"]

NEEDS = ("outputs", "rows", "gradients")


@contextmanager
def watch(
    model: nn.Module, see: Callable[[int, LayerView], None], needs: Collection[str] = ()
) -> Iterator[None]:
    """Call ``see(place, view)`` whenever a MoE layer of `model` has selected.

    A layer that is run again in the backward pass (activation checkpointing) is seen again.

    Args:
        model: holds MoE layers, which may be watched by several at once.
        see: takes the layer's place among `moe_layers(model)` and what the layer did.
        needs: "outputs" to see a layer once its experts have run, with `LayerView.output`; "rows"
            to see `LayerView.rows` too, for which they run a second time; "gradients" to see it
            in the backward pass, with `LayerView.gradient`.
    Raises:
        ValueError: something else is needed.
    """
    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ValueError(f"needs={unknown[0]!r} is unknown; choose of {', '.join(NEEDS)}")

    def call(place: int, view: LayerView) -> None:
        if "rows" in needs:
            view = replace(view, rows=expert_rows(view))
        live, kept = view.live, replace(view, live=None)
        if "gradients" not in needs:
            see(place, kept)
            return
        if live is None or not live.requires_grad:
            raise ValueError("gradients are asked for, and this forward has no backward pass")

        def backward(gradient: Tensor) -> None:
            see(place, replace(kept, gradient=gradient.detach()))

        live.register_hook(backward)

    watched = [
        # A watcher is an object of its own, so that only it is removed.
        (layer.output_watchers if needs else layer.watchers, partial(call, place))
        for place, layer in enumerate(moe_layers(model))
    ]
    for watchers, watcher in watched:
        watchers.append(watcher)
    try:
        yield
    finally:
        for watchers, watcher in watched:
            watchers[:] = [other for other in watchers if other is not watcher]


@torch.no_grad()
def expert_rows(view: LayerView) -> Tensor:
    """What the expert of each kept pair makes of its token, before it is weighed, [P, H].

    0 for pairs that were not kept, and for choices without weights.

    Raises:
        ValueError: the experts are divided among ranks.
    """
    layer, plan = _layer_and_plan(view)

    def run(x: Tensor, *parts: ExpertParams) -> Tensor:
        found = x.new_zeros(len(view.routing.token), x.shape[1])
        for params, (inside, selection) in zip(parts, plan, strict=True):
            pair = selection.kept.nonzero().squeeze(1)
            pair = pair[inside.expert[pair].argsort(stable=True)]
            counts = selection.num_tokens_per_expert
            rows = EXPERT_BACKENDS["loop"].run(x[view.routing.token[pair]], counts, params)
            found = found.index_copy(0, pair, rows)
        return found

    rows: Tensor = layer.experts(view.x, view.x.dtype, run)
    return rows


@torch.no_grad()
def expert_neurons(view: LayerView) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each expert, what its neurons make of the tokens that it kept.

    Returns:
        By expert the numbers of its kept pairs, int64 [n]; the activations that its down
        projection takes, [n, I]; and that projection, [H, I].
    Raises:
        ValueError: the experts are divided among ranks.
    """
    layer, plan = _layer_and_plan(view)

    def run(x: Tensor, *parts: ExpertParams) -> list[tuple[Tensor, Tensor, Tensor]]:
        found = []
        for params, (inside, selection) in zip(parts, plan, strict=True):
            for expert, (up, down) in enumerate(zip(params.up, params.down, strict=True)):
                pair = (selection.kept & (inside.expert == expert)).nonzero().squeeze(1)
                hidden = x[view.routing.token[pair]] @ up.T
                if params.up_bias is not None:
                    hidden = hidden + params.up_bias[expert]
                found.append((pair, activate(hidden, params.activation, params.clamp), down))
        return found

    neurons: list[tuple[Tensor, Tensor, Tensor]] = layer.experts(view.x, view.x.dtype, run)
    return neurons


def _layer_and_plan(view: LayerView) -> tuple[MoE, list[tuple[Routing, Selection]]]:
    """The layer, and the pairs of each part of its experts."""
    layer = view.layer
    assert isinstance(layer, MoE)
    if layer.parallel is not None:
        raise ValueError("rows of experts can be seen on one rank alone; load the model there")
    return layer, layer.experts.plan(view.routing, view.selection)
