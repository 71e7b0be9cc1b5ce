"""AdaMoE: tokens take as many true experts as null ones leave them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decisions import decide, from_host, layer_of
from torch import Tensor

from etr.moe import MoE, reference
from etr.moe.stats import max_violation

PROBS = [[0.4, 0.1, 0.3, 0.2], [0.3, 0.2, 0.4, 0.1], [0.1, 0.2, 0.4, 0.3], [0.4, 0.3, 0.2, 0.1]]


def layer_with(num_experts: int, nulls: int, top_k: int, **options: Any) -> MoE:
    """In float64; tokens' first numbers are their logits."""
    layer = layer_of(
        "adamoe", num_experts=num_experts, experts=f"nulls:count={nulls}", top_k=top_k, **options
    ).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(num_experts + nulls, 16))
    return layer


def true_experts(layer: MoE, x: Tensor) -> Tensor:
    """Experts with weights that each token takes, int64 [T]."""
    return decide(layer, x).routing.routing_map()[:, : layer.config.num_experts].sum(1)


@pytest.mark.criterion
def test_nulls_leave_two_of_four() -> None:
    """Balanced routing among 8 experts and 8 nulls at k = 4 gives a token 2.0 true experts on
    average, and other tokens other numbers; without nulls it is top-k exactly."""
    layer = layer_of("adamoe", num_experts=8, losses="null_balance:weight=1")
    with torch.no_grad():
        layer.router.weight[:8, 0] += 0.5  # true experts are preferred at first
    optimizer = torch.optim.Adam([layer.router.weight], lr=0.02)

    def tokens(count: int) -> Tensor:
        x = torch.randn(count, 16)
        x[:, 0] = 1.0
        return x

    held_out = tokens(4096)
    assert true_experts(layer, held_out).double().mean() > 2.5
    for _ in range(60):
        optimizer.zero_grad()
        layer(tokens(256)).losses["aux"].backward()
        optimizer.step()
    counts = true_experts(layer, held_out).double()
    assert abs(counts.mean() - 2.0) < 0.1
    assert counts.var() > 0.5
    load = decide(layer, held_out).routing.num_choices_per_expert()
    assert max_violation(load[:8]) < 0.25

    even = layer_with(8, 8, 4)  # 16 tokens, each of which wants 4 neighbours in a circle
    x = torch.stack([torch.eye(16).double()[0:4].sum(0).roll(shift) for shift in range(16)])
    counts = true_experts(even, x)
    assert counts.sum() == 2 * 16
    assert set(counts.tolist()) == {0, 1, 2, 3, 4}

    plain = layer_of("token_choice", num_experts=8, top_k=4, capacity="none").double()
    without = layer_with(8, 0, 4)
    without.load_state_dict(plain.state_dict())
    x = torch.randn(32, 16).double()
    found, want = without(x), plain(x)
    assert torch.equal(found.hidden_states, want.hidden_states)
    assert torch.equal(found.losses["aux"], want.losses["aux"])


def test_no_forward_waits_for_the_host() -> None:
    assert from_host(layer_of("adamoe"), torch.randn(5, 16)) == 0


def test_by_hand() -> None:
    """Two experts and two nulls, k = 2: f [3, 1, 3, 1] / 8, nulls shared [3, 1, 2, 2] / 8."""
    layer = layer_with(2, 2, 2, losses="null_balance:weight=1")
    x = torch.zeros(4, 16, dtype=torch.float64)
    x[:, :4] = torch.tensor(PROBS, dtype=torch.float64).log()
    view = decide(layer, x)
    chosen = view.routing.expert.view(4, 2).tolist()
    assert [sorted(row) for row in chosen] == [[0, 2], [0, 2], [2, 3], [0, 1]]
    weights = torch.zeros(4, 4, dtype=torch.float64)
    weights[view.routing.token, view.routing.expert] = view.selection.combine_weight.detach()
    want = [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [4 / 7, 3 / 7, 0, 0]]
    torch.testing.assert_close(weights, torch.tensor(want, dtype=torch.float64))
    output = layer(x)
    assert output.losses["aux"].item() == pytest.approx(1.05)
    assert not output.hidden_states[2].any()
    other = layer_with(2, 2, 2, losses="balance:weight=1")
    assert other(x).losses["aux"].item() == pytest.approx(1.125)
    counts = view.selection.num_tokens_per_expert
    assert counts.tolist() == [3, 1, 3, 1]
    one = layer.bank.flops(torch.tensor([1, 0, 0, 0]))
    assert layer.bank.flops(counts) == 4 * one  # the four pairs of true experts alone


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "nulls", "top_k"),
    [(0, 4, 2, 3), (1, 4, 2, 3), (9, 1, 3, 2), (9, 4, 0, 4), (9, 4, 4, 8), (9, 4, 2, 1)],
)
def test_outputs_losses_and_gradients_are_those_of_plain_loops(
    num_tokens: int, num_experts: int, nulls: int, top_k: int
) -> None:
    """A token's only expert keeps its gate; of several, true ones share the weight."""
    layer = layer_with(num_experts, nulls, top_k, losses="null_balance:weight=1")
    x = torch.randn(num_tokens, 16).double().requires_grad_()
    weight, choices = layer.router.weight, num_experts + nulls
    table = (x @ weight.T).softmax(-1)
    rows, counts = [], [0.0] * choices
    for token, probs in zip(x, table, strict=True):
        chosen = sorted(range(choices), key=lambda e: (-probs[e].item(), e))[:top_k]
        for e in chosen:
            counts[e] += 1
        true = [e for e in chosen if e < num_experts]
        total = sum(probs[e] for e in true) if top_k > 1 else 1.0
        outputs = [reference.expert_output(layer.bank, token, e) for e in true]
        rows.append(
            sum((probs[e] / total * y for e, y in zip(true, outputs, strict=True)), token * 0)
        )
    counts[num_experts:] = [sum(counts[num_experts:]) / max(nulls, 1)] * nulls
    loss = x.sum() * 0 + weight.sum() * 0
    for e, count in enumerate(counts if num_tokens else ()):
        loss = loss + choices * count / sum(counts) * table[:, e].mean()
    want = torch.cat((torch.stack(rows).flatten() if rows else x.flatten(), loss[None]))
    output = layer(x)
    found = torch.cat((output.hidden_states.flatten(), output.losses["aux"][None]))
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(want)
    grads = [torch.autograd.grad(value @ upstream, (x, weight)) for value in (found, want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
