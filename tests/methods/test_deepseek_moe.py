"""DeepSeekMoE: finer experts of equal cost, some of which every token passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decisions import decide
from torch import Tensor

from etr.methods import METHODS
from etr.methods.deepseek_moe import fine_grained
from etr.moe import MoE, MoEConfig, reference

SIZES: dict[str, Any] = {
    "hidden_size": 6,
    "intermediate_size": 8,
    "num_experts": 4,
    "top_k": 2,
    "router": "token_choice",
    "capacity": "none",
    "normalize": "none",
}


def parameters(layer: MoE) -> tuple[float, float, float]:
    """Of experts: all, those of one token, and multiply-adds of one token."""
    shared = layer.shared_experts
    beside = 0 if shared is None else sum(p.numel() for p in shared.parameters())
    whole = sum(p.numel() for p in layer.experts.parameters()) + beside
    counts = decide(layer, torch.randn(1, layer.config.hidden_size)).selection
    run = float(layer.bank.flops(counts.num_tokens_per_expert)) / 2 + beside
    return whole, layer.bank.parameters_of_a_token(layer.config.top_k) + beside, run


@pytest.mark.criterion
def test_costs_and_identities() -> None:
    """Expert parameters (576) and those of a token (288) are equal for 1, 2 and 4 times finer
    experts and any number of shared ones; m = 1 without shared ones is the plain layer exactly, and
    slices of a feed-forward sum to it within 1e-4."""
    config = MoEConfig(**SIZES)
    for segments in (1, 2, 4):
        for shared in range(2 * segments):
            found = fine_grained(config, segments, shared)
            assert found.num_experts + shared == 4 * segments
            assert found.top_k + shared == 2 * segments
            assert parameters(MoE(found)) == (576, 288, 288)
    assert fine_grained(config, 1, 0) == config

    # One expert of width 8, and its four slices, all of them on with weight 1.
    whole = MoE(MoEConfig(**{**SIZES, "num_experts": 1, "top_k": 1}))
    slices = MoE(fine_grained(whole.config, 4, 0))
    gate, up = whole.experts.gate_up_proj[0].chunk(2)
    with torch.no_grad():
        slices.router.weight.zero_()
        parts = [torch.cat(pair) for pair in zip(gate.chunk(4), up.chunk(4), strict=True)]
        slices.experts.gate_up_proj.copy_(torch.stack(parts))
        slices.experts.down_proj.copy_(torch.stack(whole.experts.down_proj[0].chunk(4, dim=1)))
    x = torch.randn(16, 6)
    got, want = slices(x).hidden_states * 4, whole(x).hidden_states  # the even gates are 1/4
    assert (got - want).abs().max() < 1e-4


def test_the_row_of_the_shelf_costs_what_it_is_compared_with() -> None:
    pytest.importorskip("transformers")
    from etr.train import TrainConfig, parse_variant

    card = METHODS["deepseek_moe"]
    fine, coarse = (
        parse_variant(text).apply(TrainConfig()).model.moe_config()
        for text in (card.name, card.against)
    )
    assert fine == fine_grained(coarse, 3, 1)
    assert parameters(MoE(fine)) == parameters(MoE(coarse))


def test_by_hand() -> None:
    """Two experts of which one is taken, twice as fine, one of them shared. The shared one gives x,
    the others 2x, -x and 3x; logits 1, 0, -1: y = x + .6652 * 2x."""
    coarse = {**SIZES, "hidden_size": 1, "intermediate_size": 2, "num_experts": 2, "top_k": 1}
    config = fine_grained(MoEConfig(**coarse), 2, 1)
    assert (config.num_experts, config.top_k) == (3, 1)
    layer = MoE(config).double()
    x = torch.ones(1, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.0], [0.0], [-1.0]]))
        assert layer.shared_experts is not None
        for bank, gains in ((layer.experts, [2.0, -1.0, 3.0]), (layer.shared_experts, [1.0])):
            bank.gate_up_proj.fill_(1.0)
            bank.down_proj.copy_(torch.tensor(gains).view(-1, 1, 1) / torch.sigmoid(x))
    view = decide(layer, x)
    assert view.routing.expert.tolist() == [0]
    assert view.selection.combine_weight.item() == pytest.approx(0.6652, abs=5e-5)
    assert layer(x).hidden_states.item() == pytest.approx(2.3305, abs=5e-5)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize(
    ("sizes", "segments", "shared"), [((4, 2), 2, 1), ((1, 1), 4, 3), ((2, 2), 2, 0)]
)
def test_outputs_and_gradients_are_those_of_plain_loops(
    sizes: tuple[int, int], segments: int, shared: int, num_tokens: int
) -> None:
    num_experts, top_k = sizes
    config = MoEConfig(**{**SIZES, "num_experts": num_experts, "top_k": top_k})
    layer = MoE(fine_grained(config, segments, shared)).double()
    x = torch.randn(num_tokens, 6).double().requires_grad_()
    rows: list[Tensor] = []
    for token in x:
        probs = (layer.router.weight @ token).softmax(-1)
        order = sorted(range(len(probs)), key=lambda e: (-probs[e].item(), e))
        y = token * 0
        for e in order[: segments * top_k - shared]:
            y = y + probs[e] * reference.expert_output(layer.bank, token, e)
        if layer.shared_experts is not None:
            y = y + reference.feed_forward(token, layer.shared_experts.params(token.dtype), 0)
        rows.append(y)
    found, want = layer(x).hidden_states, torch.stack(rows) if rows else x * 0
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream, leaves = torch.randn_like(want), (x, layer.router.weight, layer.experts.down_proj)
    grads = [
        torch.autograd.grad((value * upstream).sum(), leaves, allow_unused=True)
        for value in (found, want)
    ]
    for got, expected in zip(*grads, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "segments", "shared", "message"),
    [
        ({}, 3, 0, "segments=3 must be at least 1 and divide intermediate_size=8"),
        ({}, 0, 0, "segments=0 must be at least 1"),
        ({}, 2, 4, "shared=4 must be at least 0 and below segments . top_k=4"),
        ({"num_shared_experts": 1}, 2, 0, "num_shared_experts=1 and expert_bias=False"),
        ({"expert_bias": True}, 2, 0, "expert_bias=True must be 0 and False"),
    ],
)
def test_sizes_that_do_not_fit_are_named(
    changes: dict[str, Any], segments: int, shared: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fine_grained(MoEConfig(**{**SIZES, **changes}), segments, shared)
