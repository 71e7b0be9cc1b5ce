"""Routing without experts equals that of the whole layer."""

from __future__ import annotations

import pytest
import torch

from etr.adapters import DenseRouter
from etr.moe import Collector, MoE, MoEConfig, RoutingContext, after_step, moe_layers

H, E, T = 16, 4, 24
CASES = [("etr", "factor:capacity_factor=0.6", 1), ("baseline", None, 1), ("etr", "none", 2)]


def config(router: str, capacity: str | None, top_k: int) -> MoEConfig:
    from etr.moe.config import parse_capacity

    return MoEConfig(
        hidden_size=H,
        intermediate_size=8,
        num_experts=E,
        top_k=top_k,
        router=router,
        capacity=None if capacity is None else parse_capacity(capacity),
    )


def pair(*case) -> tuple[MoE, DenseRouter]:
    """A layer, and a router with the same weights."""
    layer, router = MoE(config(*case)).double(), DenseRouter(config(*case)).double()
    router.moe.router.load_state_dict(layer.router.state_dict())
    return layer, router


@pytest.mark.parametrize("case", CASES)
def test_tables_give_the_layers_output(case):
    layer, router = pair(*case)
    x = torch.randn(T, H, dtype=torch.float64)
    mask = torch.arange(T) < T - 5
    context = RoutingContext(valid_mask=mask)
    found = router(x, mask)
    routing, limit = layer.route(x.masked_fill(~mask[:, None], 0.0), context)
    selection = layer.keep(routing, limit).selection
    assert torch.equal(found.routing_map, selection.selection_map(routing))
    assert found.routing_map[T - 5 :].sum() == 0
    assert torch.equal(found.probs != 0, found.routing_map)
    want = layer(x, context)
    assert set(found.losses) == set(want.losses)
    for name, loss in want.losses.items():
        torch.testing.assert_close(found.losses[name], loss)
    # The weighted sum of every expert's output over the map is the layer's output.
    params = layer.experts.params(x.dtype)
    gate, up = torch.einsum("th,eih->tei", x, params.up).chunk(2, dim=-1)
    outputs = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, params.down)
    torch.testing.assert_close((found.probs[..., None] * outputs).sum(1), want.hidden_states)


def test_it_has_no_experts_and_learns_after_each_step():
    _, router = pair("etr", "factor:capacity_factor=0.6", 1)
    assert not any("proj" in name for name, _ in router.named_parameters())
    assert moe_layers(router) == [router.moe]
    with Collector(router):
        router(torch.randn(T, H, dtype=torch.float64))
    (stats,) = after_step(router)
    assert int(stats["num_valid_tokens"]) == T
    assert router.moe.calibration.is_calibrated


def test_gradients_reach_the_input_through_the_weights():
    _, router = pair("etr", "factor:capacity_factor=0.6", 1)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    router(x).probs.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
