"""Watching what the MoE layers of a model decide while it runs: one way for every observer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from etr.moe.experts import EXPERT_BACKENDS, ExpertParams
from etr.moe.layer import MoE
from etr.moe.layers import moe_layers
from etr.moe.view import LayerView, Watcher

__all__ = ["LayerView", "Watcher", "expert_rows", "watch"]


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
            to see `LayerView.rows` too, for which they run a second time.
    Raises:
        ValueError: something else is needed.
    """
    unknown = sorted(set(needs) - {"outputs", "rows"})
    if unknown:
        raise ValueError(f"needs={unknown[0]!r} is unknown; choose of outputs and rows")
    call = (
        (lambda place, view: see(place, replace(view, rows=expert_rows(view))))
        if ("rows" in needs)
        else see
    )
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
    layer, routing = view.layer, view.routing
    assert isinstance(layer, MoE)
    if layer.parallel is not None:
        raise ValueError("rows of experts can be seen on one rank alone; load the model there")
    plan = layer.experts.plan(routing, view.selection)

    def run(x: Tensor, *parts: ExpertParams) -> Tensor:
        found = x.new_zeros(len(routing.token), x.shape[1])
        for params, (inside, selection) in zip(parts, plan, strict=True):
            pair = selection.kept.nonzero().squeeze(1)
            pair = pair[inside.expert[pair].argsort(stable=True)]
            counts = selection.num_tokens_per_expert
            rows = EXPERT_BACKENDS["loop"].run(x[routing.token[pair]], counts, params)
            found = found.index_copy(0, pair, rows)
        return found

    rows: Tensor = layer.experts(view.x, view.x.dtype, run)
    return rows
