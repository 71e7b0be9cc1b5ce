"""What a layer decided about its tokens, for the tests of methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from etr.methods import METHODS
from etr.moe import Collector, MoE, MoEConfig, RoutingContext, after_step
from etr.moe.view import LayerView
from etr.moe.watch import watch


def layer_of(method: str, **options: Any) -> MoE:
    """A layer as the card asks for it: H 16, I 8, four experts, unless options say otherwise."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
    return MoE(MoEConfig(**{**sizes, **METHODS[method].config_options(), **options}))


def decide(layer: MoE, x: Tensor, context: RoutingContext | None = None) -> LayerView:
    """Run the layer on tokens [T, H]; what it chose and kept."""
    seen: list[LayerView] = []
    with watch(layer, lambda place, view: seen.append(view)):
        layer(x, context)
    (view,) = seen
    return view


def learn(layer: MoE, x: Tensor) -> dict[str, Tensor]:
    """One training step without a change of weights: learners see tokens [T, H]; the losses."""
    with Collector(layer):
        losses = layer(x).losses
    after_step(layer)
    return losses


class FromHost(TorchDispatchMode):
    """Counts tensors that are made of values of the host."""

    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


def from_host(layer: MoE, x: Tensor) -> int:
    """Tensors that a forward in training makes of the host's values, which a GPU waits for."""
    with FromHost() as seen:
        layer(x)
    return seen.count


def kept(view: LayerView) -> Tensor:
    """Which expert keeps which token, bool [T, E]."""
    return view.selection.selection_map(view.routing)


def best_of_choosers(view: LayerView, capacity: int) -> Tensor:
    """The `capacity` choosers of greatest score of each expert, bool [T, E], in plain loops."""
    routing = view.routing
    best = torch.zeros_like(routing.routing_map())
    for expert in range(routing.num_experts):
        choosers = routing.routing_map()[:, expert].nonzero().flatten().tolist()
        choosers.sort(key=lambda token: -float(routing.scores[token, expert]))
        best[choosers[:capacity], expert] = True
    return best
