"""Routers work in float32 whatever the activations are, under autocast too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cells import ALL, ROUTER_CELLS, Cell, E, H, context, ids, pairs, tokens
from torch import Tensor

from etr.moe import MoE, after_step
from etr.moe.collector import Collector
from etr.moe.polar import polar_factor

N = 200


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
    kept = pairs(want, layer.keep(want, limit).selection.kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, limit = layer.route(x, ctx)
        output = layer(x, ctx)
    assert pairs(got, got.valid) == pairs(want, want.valid)
    assert pairs(got, layer.keep(got, limit).selection.kept) == kept
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


WITH_DIRECTIONS = [cell for cell in ROUTER_CELLS if cell.traits.has_directions]


@pytest.mark.parametrize("cell", WITH_DIRECTIONS, ids=ids)
def test_directions_are_what_tokens_are_compared_with(cell: Cell) -> None:
    """Scores that are cosines are those with them; logits rank as products or cosines do."""
    layer, x = cell.layer(), tokens()
    found = layer.router.directions(torch.float64)
    assert found.shape == (E, H)
    routing, _ = layer.route(x, context())
    products = x @ found.T
    cosines = products / x.norm(dim=-1, keepdim=True) / found.norm(dim=-1)
    if cell.traits.has_cosine:
        torch.testing.assert_close(cosines, routing.scores, rtol=1e-9, atol=1e-12)
    elif not getattr(cell.router, "bias", False):
        assert routing.logits is not None
        order = routing.logits.argsort(dim=-1)
        assert any(torch.equal(order, table.argsort(dim=-1)) for table in (products, cosines))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_a_layer_can_be_built_in_half_precision(cell: Cell, dtype: torch.dtype) -> None:
    """As under `torch.set_default_dtype`, or by transformers' ``from_config(dtype=...)``."""
    with default_dtype(dtype):
        layer = MoE(cell.config())
        output = layer(tokens(dtype=dtype), context())
    assert {weight.dtype for weight in layer.parameters()} == {dtype}
    assert {state.dtype for state in layer.buffers()} <= {torch.float32, torch.int64}
    assert torch.isfinite(output.hidden_states).all()
    weight = dict(layer.router.named_parameters()).get("weight")
    if getattr(cell.router, "frame", "") == "orthonormal":
        assert weight is not None
        assert float((polar_factor(weight.float()) - weight.float()).abs().max()) < 4e-3


@pytest.mark.parametrize("cell", ALL, ids=ids)
def test_the_default_dtype_changes_no_number(cell: Cell) -> None:
    """Nothing between input and state is computed in whatever dtype happens to be the default."""
    start, ctx = cell.layer(torch.float32), context(251)  # which bfloat16 cannot divide
    batches = [tokens(251, torch.float32) for _ in range(2)]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = copy.deepcopy(start)
        with default_dtype(dtype):
            found: list[Tensor] = []
            for x in batches:
                with Collector(layer):
                    output = layer(x, ctx)
                after_step(layer)
                found += [output.hidden_states, *output.losses.values(), *output.stats.values()]
            with torch.no_grad():
                found.append(layer.eval()(batches[0], ctx).hidden_states)
        results.append([*found, *layer.buffers()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
