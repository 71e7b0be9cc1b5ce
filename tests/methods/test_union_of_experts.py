"""Union of Experts: slices of a feed-forward are that feed-forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decisions import decide, layer_of
from torch import Tensor, nn
from torch.nn import functional as F

from etr.moe import MoE, MoEConfig, reference


def layer_with(top_k: int = 4, num_experts: int = 4, **options: Any) -> MoE:
    """Weighed as the card says, for another top_k."""
    layer = layer_of(
        "union_of_experts",
        num_experts=num_experts,
        top_k=top_k,
        normalize="chosen" if top_k > 1 else None,
        routed_scale=float(top_k) if top_k > 1 else 1.0,
        **options,
    ).double()
    for name, parameter in layer.experts.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def dense(layer: MoE, x: Tensor, slices: Any = slice(None)) -> Tensor:
    """The feed-forward that the slices, or some of them, are cut from, with gelu."""
    experts = layer.experts
    up = experts.up_proj[slices].flatten(0, 1)
    down = experts.down_proj[slices].transpose(0, 1).flatten(1)
    hidden = F.gelu(F.linear(x, up, experts.up_proj_bias[slices].flatten()))
    return F.linear(hidden, down, experts.output_bias)


@pytest.mark.criterion
def test_slices_are_the_whole() -> None:
    """All slices on with even gates are the dense feed-forward within 1e-12 in float64, its output
    bias once; k of E slices cost k / E of its operations, and for k >= 2 the gate has a
    gradient."""
    layer = layer_with(activation="gelu", expert_bias=True)
    with torch.no_grad():
        layer.router.weight.zero_()
    x = torch.randn(32, 16).double()
    assert (layer(x).hidden_states - dense(layer, x)).abs().max() < 1e-12
    assert layer.experts.output_bias.abs().max() > 0.1  # in each slice it would be 4 times

    for top_k in (1, 2, 3, 4):
        layer = layer_with(top_k)
        counts = decide(layer, x).selection.num_tokens_per_expert
        whole = layer.bank.flops(torch.full((4,), 32))
        assert float(layer.bank.flops(counts) / whole) == top_k / 4
        if top_k >= 2:
            layer(x).hidden_states.square().sum().backward()
            assert layer.router.weight.grad.abs().max() > 1e-3


def test_by_hand() -> None:
    """W1 = [[1, 0], [0, 1], [1, 1], [1, -1]], x = [1, -1]: slices [1, 0] and [8, -2], all [9, -2].

    By squares of what is positive: 1, 0, 0 and 4, which the last column of W2 allows for.
    """
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_experts": 2, "top_k": 2}
    layer = layer_of("union_of_experts", **sizes, routed_scale=2.0, activation="relu2").double()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.experts.up_proj.copy_(torch.tensor([[[1, 0], [0, 1]], [[1, 1], [1, -1]]]))
        layer.experts.down_proj.copy_(torch.tensor([[[1, 2], [0, 1]], [[3, 2], [0, -0.5]]]))
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    parts = [reference.expert_output(layer.bank, x[0], e).tolist() for e in (0, 1)]
    assert parts == [[1, 0], [8, -2]]
    torch.testing.assert_close(layer(x).hidden_states, torch.tensor([[9.0, -2.0]]).double())


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 2), (9, 4, 3), (9, 4, 4), (9, 1, 1)]
)
def test_outputs_and_gradients_are_those_of_plain_loops(
    num_tokens: int, num_experts: int, top_k: int
) -> None:
    """With biases: a slice's own, and one of outputs for each token that is kept."""
    layer = layer_with(top_k, num_experts, activation="gelu", expert_bias=True)
    x = torch.randn(num_tokens, 16).double().requires_grad_()
    rows: list[Tensor] = []
    for token in x:
        probs = (layer.router.weight @ token).softmax(-1)
        chosen = sorted(range(num_experts), key=lambda e: (-probs[e].item(), e))[:top_k]
        share = top_k / sum(probs[e] for e in chosen) if top_k > 1 else 1.0
        y = layer.experts.output_bias
        for e in chosen:
            up, bias = layer.experts.up_proj[e], layer.experts.up_proj_bias[e]
            y = y + probs[e] * share * (layer.experts.down_proj[e] @ F.gelu(up @ token + bias))
        rows.append(y)
    found, want = layer(x).hidden_states, torch.stack(rows) if rows else x * 0
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(want)
    leaves = (x, *layer.parameters())
    grads = [
        torch.autograd.grad((value * upstream).sum(), leaves, allow_unused=True)
        for value in (found, want)
    ]
    for got, expected in zip(*grads, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_token_that_nothing_keeps_gets_nothing() -> None:
    layer = layer_with(
        1, activation="gelu", expert_bias=True, capacity="factor:capacity_factor=0.1"
    )
    x = torch.randn(40, 16).double()
    view = decide(layer, x)
    y = layer(x).hidden_states
    lonely = ~view.selection.kept
    assert lonely.any()
    assert not y[lonely].any()
    assert y[~lonely].abs().sum(-1).min() > 0


def test_slices_start_as_the_whole_would() -> None:
    """The second projection by the width of all slices; so that a dense start has no jump."""
    config = layer_of("union_of_experts", num_experts=8).config
    big = MoE(MoEConfig(**{**config.options(), **sizes_of(config, 64)}))
    torch.testing.assert_close(
        big.experts.down_proj.std().item(), (8 * 64) ** -0.5, rtol=0.05, atol=0
    )
    torch.testing.assert_close(big.experts.gate_up_proj.std().item(), 16**-0.5, rtol=0.05, atol=0)
    names = {name for name, _ in layer_with(expert_bias=True).experts.named_parameters()}
    assert names == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "output_bias"}


def sizes_of(config: MoEConfig, width: int) -> dict[str, int]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": width,
        "num_experts": config.num_experts,
        "top_k": config.top_k,
    }
