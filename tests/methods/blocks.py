"""Layers and tokens for the tests of policies by which a block shares its experts."""

from __future__ import annotations

import torch
from decisions import layer_of
from torch import Tensor, nn

from etr.moe import MoE, RoutingContext
from etr.moe.routing import Routing

PROBS = [[0.5, 0.3, 0.15, 0.05], [0.1, 0.6, 0.05, 0.25], [0.45, 0.05, 0.4, 0.1]]
"""Of three tokens for four experts."""


def layer(num_experts: int = 16, top_k: int = 2, **options: object) -> MoE:
    """In eval mode, in float64, normalised over a token's experts, without a capacity."""
    given = {"num_experts": num_experts, "top_k": top_k, "capacity": "none", **options}
    return layer_of("token_choice", **given).double().eval()


def worked(gate: str) -> tuple[MoE, Tensor]:
    """A layer and three tokens whose probabilities, or sigmoids, are `PROBS`."""
    found = layer(4, router=f"token_choice:gate={gate}", normalize="chosen")
    values = torch.tensor(PROBS, dtype=torch.float64)
    logits = values.log() if gate == "softmax" else values.logit()
    with torch.no_grad():
        found.router.weight.copy_(torch.eye(4, 16))
    return found, nn.functional.pad(logits, (0, 12))


def route(layer: MoE, x: Tensor, serving: str, block: list[int] | None = None) -> Routing:
    """What tokens [T, H] of a block each want."""
    named = None if block is None else torch.tensor(block)
    routing, limit = layer.route(x, RoutingContext(serving=serving, block=named))
    assert limit is not None
    assert limit.min_score is None
    return routing


def weights(layer: MoE, x: Tensor, serving: str) -> list[dict[int, float]]:
    """Weight of each expert that a token takes."""
    routing = route(layer, x, serving)
    weight = layer.keep(routing).selection.combine_weight
    found: list[dict[int, float]] = [{} for _ in x]
    for token, expert, value in zip(routing.token, routing.expert, weight, strict=True):
        found[int(token)][int(expert)] = round(float(value.detach()), 4)
    return found


def same(a: Routing, b: Routing) -> bool:
    """Whether tokens take the same experts with the same gates, bit for bit."""
    return torch.equal(a.expert, b.expert) and torch.equal(a.gate, b.gate)
