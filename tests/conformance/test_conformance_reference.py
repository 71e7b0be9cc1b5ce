"""Every cell against the plain loops of etr.moe.reference: values, gradients, conservation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import (
    ALL,
    BACKEND_CELLS,
    BACKENDS,
    ROUTER_CELLS,
    Cell,
    E,
    H,
    T,
    context,
    ids,
    pairs,
    policy,
    tokens,
    train_steps,
    with_backends,
)
from torch import Tensor

from etr.moe import EXPERT_BACKENDS, EtrRouter, MoE, reference
from etr.moe.context import RoutingContext
from etr.moe.experts import ACTIVATIONS
from etr.moe.routing import Routing


def gradients(layer: MoE, x: Tensor, y: Tensor, weight: Tensor) -> dict[str, Tensor]:
    names = ["x", *(name for name, _ in layer.named_parameters())]
    values = [x, *layer.parameters()]
    grads = torch.autograd.grad((y * weight).sum(), values, allow_unused=True)
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for name, value, grad in zip(names, values, grads, strict=True)
    }


def compare(layer: MoE, x: Tensor, ctx: RoutingContext, tolerance: float = 1e-10) -> Routing:
    """Assert that layer and reference agree, relative to each tensor's norm; return the routing."""

    def assert_close(name: str, got: Tensor, want: Tensor) -> None:
        error = float((got.double() - want.double()).norm().detach())
        assert error <= tolerance * (float(want.double().norm().detach()) + 1e-3), (name, error)

    x = x.requires_grad_()
    y = layer(x, ctx).hidden_states
    routing, limit = layer.route(x, ctx)
    kept_of = layer.keep(routing, limit)
    selection, limit = kept_of.selection, kept_of.limit
    want, kept = reference.moe(layer, x, routing, limit)
    assert pairs(routing, selection.kept) == kept
    assert_close("y", y, want)
    weight = torch.randn_like(y)
    got_grads, want_grads = gradients(layer, x, y, weight), gradients(layer, x, want, weight)
    for name in got_grads:
        assert_close(name, got_grads[name], want_grads[name])
    return routing


@pytest.mark.parametrize("cell", with_backends(ALL), ids=ids)
def test_values_and_gradients_equal_the_reference(cell: Cell) -> None:
    mask = torch.rand(T) > 0.15
    layer, ctx = cell.layer(), context(valid_mask=mask)
    routing = compare(layer, tokens(), ctx)
    if cell.traits.tokens_choose and cell.traits.causal and routing.scores is not None:
        assert_best(routing, mask)


def assert_best(routing: Routing, mask: Tensor) -> None:
    """Every valid token chose those it scores highest, best first, and as many as it should."""
    assert routing.scores is not None
    for t, chosen in enumerate(routing.expert.view(T, -1).tolist()):
        count = sum(e < E for e in chosen)
        assert chosen[count:] == [E] * (len(chosen) - count)
        assert chosen[:count] == reference.top_k(routing.scores[t].tolist(), count)
        if not mask[t]:
            assert count == 0
        elif routing.fixed_k:
            assert count == routing.top_k


@pytest.mark.parametrize("cell", ALL, ids=ids)
def test_pairs_and_tokens_are_conserved(cell: Cell) -> None:
    mask = torch.rand(T) > 0.3
    layer, ctx, x = cell.layer(), context(valid_mask=mask), tokens()
    output = layer(x, ctx)
    routing, limit = layer.route(x, ctx)
    kept_of = layer.keep(routing, limit)
    selection, limit = kept_of.selection, kept_of.limit
    stats, valid = output.stats, int(mask.sum())
    kept = pairs(routing, selection.kept)
    assert len(kept) == int(selection.kept.sum()) == int(stats["num_tokens_per_expert"].sum())
    assert kept <= pairs(routing, routing.valid)
    assert {t for t, _ in kept} <= set(mask.nonzero().flatten().tolist())
    assert int(stats["num_valid_tokens"]) == valid
    if cell.traits.tokens_choose:
        asked = int(stats["num_choices_per_expert"].sum())
        assert asked == valid * cell.top_k or not cell.traits.fixed_k
        assert int(stats["num_slots"]) == asked
        assert len(kept) + int((routing.valid & ~selection.kept).sum()) == asked
    lonely = [t for t in range(T) if t not in {t for t, _ in kept}]
    assert torch.equal(output.hidden_states[lonely], torch.zeros(len(lonely), H).double())
    assert int(stats["num_tokens_without_expert"]) == sum(bool(mask[t]) for t in lonely)
    assert not selection.combine_weight[~selection.kept].any()
    for e in range(E):
        start, size = int(selection.bounds[e]), int(selection.num_tokens_per_expert[e])
        queue = selection.order[start : start + size].tolist()
        mine = selection.kept & (routing.expert == e)
        assert sorted(queue) == mine.nonzero().flatten().tolist()
        if limit.capacity is not None:
            assert size <= int(limit.capacity[e])
    assert int(selection.num_tokens_per_expert.max()) <= selection.buffer_size


def test_the_cells_drop_tokens() -> None:
    """Otherwise the comparisons above would say little."""
    dropping = 0
    for cell in ALL:
        stats = cell.layer()(tokens(), context()).stats
        dropping += int(stats["num_tokens_per_expert"].sum()) < T * cell.top_k
    assert dropping > len(ALL) / 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("normalize", ["none", "chosen", "kept"])
@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
def test_options_of_the_layer(activation: str, shared: int, normalize: str, backend: str) -> None:
    cell = next(c for c in ALL if c.router.name == "etr")
    options = {"activation": activation, "num_shared_experts": shared, "normalize": normalize}
    compare(cell.layer(backend=backend, **options), tokens(), context())


FAMILY_OPTIONS: list[dict[str, Any]] = [
    {"expert_bias": True},
    {"expert_bias": True, "activation": "gelu"},
    {"activation": "clamped_swiglu", "swiglu_limit": 0.4, "swiglu_alpha": 1.3},
    {"routed_scale": 2.5},
    {"num_shared_experts": 2, "shared_intermediate_size": 3, "shared_gate": True},
    {"expert_bias": True, "routed_scale": 0.5, "num_shared_experts": 1, "shared_gate": True},
]
"""Options of the layer that model families have, alone and together."""


@pytest.mark.parametrize("options", FAMILY_OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
@pytest.mark.parametrize("name", ["etr", "token_choice"])
def test_options_of_model_families(name: str, backend: str, options: dict[str, Any]) -> None:
    if EXPERT_BACKENDS[backend].unavailable():
        pytest.skip(str(EXPERT_BACKENDS[backend].unavailable()))
    cell = next(c for c in ALL if c.router.name == name)
    layer = cell.layer(backend=backend, **options)
    with torch.no_grad():
        for key, weight in layer.named_parameters():
            if key.endswith("_bias"):
                weight.normal_()
    compare(layer, tokens(), context())


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_top_k(cell: Cell, top_k: int) -> None:
    if top_k > cell.top_k and cell.top_k == 1:
        pytest.skip("defined for top_k=1")
    routing = compare(cell.layer(top_k=top_k), tokens(), context())
    if cell.traits.tokens_choose and cell.traits.fixed_k:
        assert int(routing.valid.sum()) == T * top_k


@pytest.mark.parametrize("selection", ["dropless", "batch"])
@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_eval_selections(cell: Cell, selection: str) -> None:
    layer = cell.layer(eval_selection=selection).eval()
    routing = compare(layer, tokens(), context())
    if selection == "dropless":
        routing, limit = layer.route(tokens(), context())
        assert torch.equal(layer.keep(routing, limit).selection.kept, routing.valid)
        assert int(routing.valid.sum()) == T * cell.top_k or not cell.traits.fixed_k


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)],
)
@pytest.mark.parametrize("backend", ["loop", "bmm", "grouped_mm"])
def test_lower_precision(
    dtype: torch.dtype, tolerance: float, backend: str, nan_filled_memory: None
) -> None:
    """Also the path of torch's grouped_mm, which has no float64; NaN shows what was not written."""
    cell = next(c for c in ALL if c.router.name == "token_choice")
    layer, x, mask = cell.layer(dtype, backend=backend), tokens(dtype=dtype), torch.rand(T) > 0.2
    compare(layer, x, context(valid_mask=mask), tolerance)


@pytest.mark.parametrize("cell", with_backends(ALL), ids=ids)
def test_uninitialised_memory_never_leaks(cell: Cell, nan_filled_memory: None) -> None:
    mask = torch.arange(T) < T - 5
    layer, x = cell.layer(torch.float32), tokens(dtype=torch.float32).requires_grad_()
    output = layer(x, context(valid_mask=mask))
    (output.hidden_states.square().sum() + sum(output.losses.values())).backward()
    found: dict[str, Any] = {"y": output.hidden_states, "x": x.grad, **output.losses}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    for name, value in found.items():
        assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_gradcheck(cell: Cell) -> None:
    """Random scores are distinct, so the selection stays as the check moves inputs by 1e-6."""
    layer, ctx = cell.layer(losses=_all_losses(cell)), context(6)
    x = tokens(6).requires_grad_()
    router = list(layer.router.parameters())

    def function(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        output = layer(x, ctx)
        return (output.hidden_states, *output.losses.values())

    assert torch.autograd.gradcheck(function, (x, *router), fast_mode=True)


def _all_losses(cell: Cell) -> Any:
    from etr.moe import LossConfig

    if not cell.traits.has_probs:
        return LossConfig()
    return LossConfig(aux_alpha=1.0 if cell.traits.tokens_choose else 0.0, z_beta=1.0)


def test_the_cells_of_backends_have_all_that_engines_can_tell_apart() -> None:
    """Otherwise an engine could fail where only loops are tried."""
    seen: dict[str, set[bool]] = {}
    for cell in BACKEND_CELLS:
        layer = cell.layer()
        train_steps(layer)
        routing, limit = layer.route(tokens(), context())
        kept = layer.keep(routing, limit)
        counts, limit = kept.selection.num_tokens_per_expert, kept.limit
        facts = {
            "some dropped": int(counts.sum()) < T * cell.top_k,
            "several experts a token": cell.top_k > 1,
            "tokens choose": cell.traits.tokens_choose,
            "a capacity": limit.capacity is not None,
            "a least score": limit.min_score is not None,
            "equal counts": len(set(counts.tolist())) == 1,
        }
        for fact, holds in facts.items():
            seen.setdefault(fact, set()).add(holds)
    assert seen == {fact: {True, False} for fact in seen}
    assert set(BACKENDS) >= {"loop", "bmm", "grouped_mm"}


@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_flag_fixed_load(cell: Cell) -> None:
    """Under one capacity for all, fixed_load=True means equal counts; False shows without any."""
    layer = cell.layer(capacity=policy("factor") if cell.traits.fixed_load else "none")
    counts = [layer(tokens(), context()).stats["num_tokens_per_expert"].tolist() for _ in range(8)]
    equal = [min(count) == max(count) > 0 for count in counts]
    assert all(equal) == cell.traits.fixed_load, counts


@pytest.mark.parametrize("cell", [c for c in ROUTER_CELLS if c.traits.tokens_choose], ids=ids)
def test_flag_fixed_k(cell: Cell) -> None:
    """Where it is False, tokens of a batch take unequal numbers of experts; else `top_k` each."""
    routing, _ = cell.layer().route(tokens(), context())
    counts = set(routing.routing_map().sum(1).tolist())
    assert counts == {cell.top_k} if cell.traits.fixed_k else len(counts) > 1


def test_the_cells_pair_every_gate_with_every_score() -> None:
    """What weighs and what ranks are independent: cosine or probability, softmax or sigmoid."""
    pairs = {
        (c.router.gate, c.router.score) for c in ROUTER_CELLS if isinstance(c.router, EtrRouter)
    }
    assert pairs == {(g, s) for g in ("softmax", "sigmoid") for s in ("cosine", "prob")}
