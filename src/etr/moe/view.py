"""What an observer sees of a layer's forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from etr.moe.collector import Collected
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What one MoE layer did with its tokens in one forward.

    Args:
        layer: the layer.
        x: its input, [T, H]; detached.
        routing, selection: over the same T tokens, with whatever gradient they have.
        output: what the layer makes of them, [T, H], shared experts included; detached. None
            before the experts run.
        rows: what each pair's expert makes of its token before it is weighed, [P, H]; 0 where the
            pair was not kept. None unless it was asked for.
        gradient: of the loss by `output`, [T, H]. None unless it was asked for.
        residual: what the model adds the output to, [T, H], in the output's unit. None unless it
            was asked for.
        live: `output` with its graph, for whoever hooks it.
        task: number of the task of each token, int64 [T]. None where the context has none.
    """

    layer: Collected
    x: Tensor
    routing: Routing
    selection: Selection
    output: Tensor | None = None
    rows: Tensor | None = None
    gradient: Tensor | None = None
    residual: Tensor | None = None
    live: Tensor | None = None
    task: Tensor | None = None


Watcher = Callable[[LayerView], None]
"""Called by a layer once its experts have selected, before they run or after."""


def show(
    watchers: list[Watcher],
    layer: Collected,
    x: Tensor,
    routing: Routing,
    selection: Selection,
    output: Tensor | None = None,
    *,
    task: Tensor | None = None,
) -> None:
    """Call watchers with what a layer did."""
    for watcher in watchers:
        watcher(
            LayerView(
                layer=layer,
                x=x.detach(),
                routing=routing,
                selection=selection,
                output=None if output is None else output.detach(),
                live=output,
                task=None if task is None else task.reshape(-1),
            )
        )
