"""Routers work in float32 whatever the activations are, under autocast too."""

from __future__ import annotations

import pytest
import torch
from cells import ROUTER_CELLS, Cell, H, context, ids, pairs, tokens

N = 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_output_has_the_dtype_of_the_input(cell: Cell, dtype: torch.dtype) -> None:
    layer, x = cell.layer(dtype), tokens(dtype=dtype).requires_grad_()
    output = layer(x, context())
    assert output.hidden_states.dtype == dtype
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    routing, _ = layer.route(x, context())
    for table in (routing.scores, routing.probs, routing.logits, routing.gate):
        assert table is None or table.dtype == wanted
    (output.hidden_states.float().sum() + sum(output.losses.values())).backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_bfloat16_tokens_are_scored_in_float32(cell: Cell, autocast: bool) -> None:
    """Selection equals that of the same tokens given as float32."""
    layer, ctx = cell.layer(torch.float32), context(N)
    x = tokens(N, torch.bfloat16)
    want, limit = layer.route(x.float(), ctx)
    kept = pairs(want, layer.select(want, limit).kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, limit = layer.route(x, ctx)
        output = layer(x, ctx)
    assert pairs(got, got.valid) == pairs(want, want.valid)
    assert pairs(got, layer.select(got, limit).kept) == kept
    assert torch.equal(got.gate, want.gate)
    assert int(output.stats["num_tokens_per_expert"].sum()) == len(kept)


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_autocast_runs_experts_low_and_routers_high(cell: Cell) -> None:
    layer, x, ctx = cell.layer(torch.float32), tokens(N, torch.float32), context(N)
    plain = layer(x, ctx)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x, ctx)
    assert low.hidden_states.dtype == torch.float32
    for name in plain.stats:
        assert torch.equal(low.stats[name], plain.stats[name]), name
    for name in plain.losses:
        assert torch.equal(low.losses[name], plain.losses[name]), name
    assert not torch.equal(low.hidden_states, plain.hidden_states)
    error = (low.hidden_states - plain.hidden_states).norm() / plain.hidden_states.norm()
    assert float(error) < 2e-2


def test_bfloat16_sums_would_flip_choices() -> None:
    """The reason for the rule, and proof that the tests above can fail."""
    cell = next(c for c in ROUTER_CELLS if c.router.name == "etr_paper")
    x = torch.randn(4000, H).bfloat16()
    affinity = x.unflatten(-1, (4, H // 4))
    low = affinity[..., 0].clone()
    for i in range(1, H // 4):
        low = low + affinity[..., i]
    routing, _ = cell.layer(torch.float32, top_k=1).route(x, context(4000))
    flips = (low.argmax(-1) != routing.expert).float().mean()
    assert 0 < float(flips) < 0.05
