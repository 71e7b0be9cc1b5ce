"""TC-MoE: experts of both signs, and choices that run nothing."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from decisions import decide, from_host, layer_of
from torch import Tensor
from toys import Net, Toy, train

from etr.moe import MoE, RoutingContext
from etr.moe.reference import feed_forward


def worked(*logits: float) -> tuple[MoE, Tensor]:
    """Two experts, two null choices, and one token with these logits before the constants."""
    layer = layer_of("tc_moe", num_experts=2, top_k=2).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(6, 16))
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, :6] = torch.tensor(logits)
    return layer, x


@pytest.mark.parametrize(
    ("logits", "probs", "chosen", "weights"),
    [
        (
            (2, 0, 1, 2.5, 9, 0),
            [0.51894, 0.07023, 0.07023, 0.31475, 0.02584, 0.0],
            [0, 3],
            [0.60375, -0.36619],
        ),
        ((2, 0, 1, 0, 12, 0), None, [0, 4], [0.5, 0.0]),
    ],
)
def test_worked_weights(
    logits: tuple[float, ...], probs: list[float] | None, chosen: list[int], weights: list[float]
) -> None:
    layer, x = worked(*logits)
    view = decide(layer, x)
    if probs is not None:
        assert view.routing.probs[0].tolist() == pytest.approx(probs, abs=6e-6)
    assert view.routing.expert.tolist() == chosen
    assert view.selection.combine_weight.tolist() == pytest.approx(weights, abs=6e-6)


def test_both_signs_of_an_expert_run_it_once() -> None:
    """Where only the constants differ: (1 - 1 / e) / (1 + 1 / e) = .46212 of its output."""
    layer, x = worked(9, 0, 9, 0, 0, 0)
    view = decide(layer, x)
    assert view.routing.expert.tolist() == [0, 2]
    ((pairs, kept),) = layer.bank.plan(view.routing, view.selection)
    assert kept.num_tokens_per_expert.tolist() == [1, 0]
    assert pairs.num_experts == 2
    output = feed_forward(x[0], layer.experts.params(x.dtype), 0)
    torch.testing.assert_close(layer(x).hidden_states[0], 0.46212 * output, rtol=1e-4, atol=1e-6)


def test_the_other_sign_is_minus_the_output() -> None:
    layer, x = worked(0, 0, 0, 0, -9, -9)
    layer.reconfigure(router=dataclasses.replace(layer.config.router_config, negative=0.0))
    params = layer.experts.params(x.dtype)
    for sign, choice in ((1, 0), (-1, 2)):  # the others have next to no weight
        x[0, :4] = -40.0
        x[0, choice] = 9.0
        want = sign * feed_forward(x[0], params, 0)
        torch.testing.assert_close(layer(x).hidden_states[0], want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_against_plain_loops(top_k: int) -> None:
    """One token and one choice at a time; values and gradients, padding left out."""
    layer = layer_of("tc_moe", num_experts=3, top_k=top_k).double()
    with torch.no_grad():
        layer.router.weight.mul_(2)
    x, mask = torch.randn(9, 16, dtype=torch.float64), torch.arange(9) != 4
    params, rows = layer.experts.params(x.dtype), []
    for t, token in enumerate(x):
        logits = layer.router.weight @ token + torch.tensor([0.0] * 3 + [-1] * 3 + [-10] * 2)
        p = logits.exp() / logits.exp().sum()
        best = sorted(range(8), key=lambda e: -float(p[e].detach()))[:top_k]
        divisor = sum(p[e] for e in best if e < 6) + p[6] + p[7]
        total = token * 0
        for e in (e for e in best if e < 6):
            sign = 1 if e < 3 else -1
            total = total + sign * p[e] / divisor * feed_forward(token, params, e % 3)
        rows.append(total * int(mask[t]))
    found, want = layer(x, RoutingContext(valid_mask=mask)).hidden_states, torch.stack(rows)
    torch.testing.assert_close(found, want)
    values, probe = list(layer.parameters()), torch.randn_like(want)
    for got, right in zip(
        torch.autograd.grad((found * probe).sum(), values),
        torch.autograd.grad((want * probe).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_weights_sum_to_one_at_most_and_no_later_token_changes_them() -> None:
    layer, x = layer_of("tc_moe", num_experts=4, top_k=3), 3 * torch.randn(64, 16)
    view = decide(layer, x)
    sums = torch.zeros(64).index_add(0, view.routing.token, view.selection.combine_weight.abs())
    assert sums.max() <= 1 + 1e-6
    assert (view.selection.combine_weight < 0).any()
    later = x.clone()
    later[32:] *= -1
    assert torch.equal(decide(layer, later).routing.expert[:96], view.routing.expert[:96])


def test_even_use_has_balance_1_and_null_choices_a_reward() -> None:
    """Experts 0 to 3 once each with either sign; null probability q is worth reward * q."""
    for reward in (0.0, 0.5):
        layer = layer_of(
            "tc_moe",
            top_k=1,
            router="ternary_choice:nulls=2,negative=0,null=0",
            losses=f"ternary_balance:weight=1,reward={reward}",
        ).double()
        with torch.no_grad():
            layer.router.weight.copy_(2 * torch.eye(10, 16))
        x = torch.eye(10, 16, dtype=torch.float64)[[0, 5, 2, 7]]
        assert decide(layer, x).routing.expert.tolist() == [0, 5, 2, 7]
        null = decide(layer, x).routing.probs[:, 8:].sum(-1).mean()
        torch.testing.assert_close(layer(x).losses["ternary_balance"], 1 - reward * null)


def test_no_forward_waits_for_the_host() -> None:
    layer = layer_of("tc_moe", losses="ternary_balance:reward=1")
    assert from_host(layer, torch.randn(5, 16)) == 0


def test_operations_are_those_of_either_sign() -> None:
    layer = layer_of("tc_moe", num_experts=2)
    assert float(layer.bank.flops(torch.tensor([3, 0, 1, 2, 9, 9]))) == 6 * 2 * 3 * 16 * 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "ternary_choice:nulls=-1"}, "nulls=-1 choices must be at least 0"),
        (
            {"router": "ternary_choice:nulls=1", "experts": "uniform"},
            "nulls=1 leaves 3 of 4 choices; there must be two",
        ),
        ({"experts": "ternary:nulls=-1"}, "nulls=-1 choices must be at least 0"),
        ({"experts": "ternary:nulls=4"}, "experts='ternary' has nulls=4 .* has nulls=2; they must"),
        ({"experts": "shared:ternary"}, None),
        ({"normalize": "none", "routed_scale": 2.0}, None),
        (
            {"top_k": 2, "normalize": "chosen"},
            "normalize='chosen': weights of router 'ternary_choice' have",
        ),
        (
            {"top_k": 2, "normalize": "kept"},
            "normalize='kept': weights of router 'ternary_choice' have signs",
        ),
        ({"losses": "ternary_balance:reward=-1"}, "reward=-1 of loss 'ternary_balance'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str | None) -> None:
    refused = nullcontext() if words is None else pytest.raises(ValueError, match=words)
    with refused:
        layer_of("tc_moe", **options)


def experts_run(seed: int, null: float, reward: float) -> float:
    """Experts that a token runs, the mean after 800 steps; clusters in pairs of opposite sign."""

    def target(toy: Toy, x: Tensor, cluster: Tensor) -> Tensor:
        maps = torch.tanh(2 * torch.einsum("td,tdh->th", x, toy.maps[cluster // 2]))
        return torch.where((cluster % 2 == 0)[:, None], maps, -maps)

    torch.manual_seed(seed)
    model = Net(
        "tc_moe",
        top_k=2,
        intermediate_size=8,
        router=f"ternary_choice:null={null}",
        losses=f"ternary_balance:weight=0.01,reward={100 * reward}",
    )
    toy, layer = Toy(seed, target=target), model.layers[0]
    with torch.no_grad():
        layer.router.weight.mul_(3**-0.5)  # as linear layers of torch start
    train(model, toy, 800)
    x, _, _ = toy.draw(8192, torch.Generator().manual_seed(999))
    view = decide(layer, x)
    ((_, kept),) = layer.bank.plan(view.routing, view.selection)
    return float(kept.num_tokens_per_expert.sum()) / 8192


@pytest.mark.measured
@pytest.mark.criterion
def test_fewer_experts_run_for_a_reward() -> None:
    """Tokens run fewer than top_k = 2 experts, with the null choices' constant at -1 fewer still,
    and with a reward of 0.1 fewer than that, in each of 3 seeds."""
    for seed in range(3):
        found = [experts_run(seed, *given) for given in ((-10, 0), (-1, 0), (-1, 0.1))]
        assert 2 > found[0] > found[1] > found[2]
