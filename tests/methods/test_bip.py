"""BIP: prices of experts, from the scores of a batch, even out its load."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor

from etr.methods.bip import Bip, dual_steps
from etr.moe import Collector, MoE, after_step, reference
from etr.moe.context import RouterInput
from etr.moe.routing import Scores
from etr.moe.stats import max_violation

SCORES = torch.tensor(
    [[0.625, 0.25, 0.125], [0.5, 0.375, 0.125], [0.5, 0.1875, 0.3125]], dtype=torch.float64
)


def layer_with(num_experts: int = 8, top_k: int = 1, **options: Any) -> MoE:
    return layer_of("bip", num_experts=num_experts, top_k=top_k, router=Bip(**options))


def favoured(**options: Any) -> MoE:
    """All tokens of `tokens` favour the first expert."""
    layer = layer_with(**options)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.25)
        layer.router.weight[:, 0] = 0.0
        layer.router.weight[0, 0] = 1.5
    return layer


def tokens(num_tokens: int = 512) -> Tensor:
    x = torch.randn(num_tokens, 16)
    x[:, 0] = 1.0
    return x


def violation(layer: MoE, x: Tensor) -> float:
    return float(max_violation(decide(layer, x).routing.num_choices_per_expert()))


def other_half(x: Tensor) -> Tensor:
    """`x` with another second half, in which tokens want other experts."""
    half = len(x) // 2
    return torch.cat((x[:half], 3 * x[half:].flip(-1)))


@pytest.mark.criterion
@pytest.mark.parametrize("top_k", [1, 2])
def test_four_dual_steps_even_the_load(top_k: int) -> None:
    """Where one of 8 experts is the favourite of all tokens (MaxVio > 2), 4 dual steps bring MaxVio
    to 0.1 or less in every batch, while weights stay those of the scores; served, and with prices
    of the step before, no later token changes an earlier one's experts."""
    layer = favoured(top_k=top_k, steps=4)
    assert violation(layer.eval(), tokens()) > 2
    layer.train()
    for _ in range(6):
        x = tokens()
        view = decide(layer, x)
        assert violation(layer, x) <= 0.1
        chosen = view.routing.probs[view.routing.token, view.routing.expert]
        assert torch.equal(view.routing.gate, chosen)
        learn(layer, x)
    before = favoured(top_k=top_k, sees="before")
    learn(before, tokens())
    x = tokens()
    for one, training in ((layer, True), (before, True), (layer, False)):
        one.train(training)
        found, other = (decide(one, given).routing.routing_map() for given in (x, other_half(x)))
        causal = one is before or not training
        assert torch.equal(found[:256], other[:256]) == causal


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(
    ("clamp", "price", "experts"),
    [(True, [0.1875, 0, 0], [0, 1, 0]), (False, [1 / 6, -1 / 48, -7 / 48], [0, 1, 2])],
)
def test_by_hand(clamp: bool, price: list[float], experts: list[int], steps: int) -> None:
    """Margins .25, .375, .3125; clamped, the last token is indifferent and takes the first."""
    valid, start = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.float64)
    found = dual_steps(SCORES, valid, start, 1, steps, clamp)
    torch.testing.assert_close(found, torch.tensor(price, dtype=torch.float64))
    router = layer_with(3, clamp=clamp, steps=steps).router
    inputs = RouterInput(
        valid_mask=valid,
        token_ids=None,
        token_index=torch.arange(3),
        step=torch.zeros(()),
        layer_index=0,
    )
    scores = Scores(scores=SCORES, logits=None, gates=SCORES, probs=SCORES)
    routing = router.choose(scores, inputs)
    assert routing.expert.tolist() == experts
    assert torch.equal(routing.gate, SCORES[range(3), experts])


def plain_steps(
    rows: list[list[float]], price: list[float], k: int, steps: int, clamp: bool
) -> list[float]:
    """The definition, in Python numbers."""
    num_experts = len(price)
    if k == num_experts or not rows:
        return price
    for _ in range(steps):
        margins = [
            sorted((s - q for s, q in zip(row, price, strict=True)), reverse=True)[k]
            for row in rows
        ]
        margins = [max(m, 0.0) for m in margins] if clamp else margins
        room = k * len(rows) // num_experts
        price = [
            sorted((row[e] - m for row, m in zip(rows, margins, strict=True)), reverse=True)[room]
            for e in range(num_experts)
        ]
        mean = sum(price) / num_experts
        price = [max(q, 0.0) for q in price] if clamp else [q - mean for q in price]
    return price


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "k"),
    [(0, 4, 2), (1, 4, 2), (1, 4, 3), (9, 1, 1), (9, 4, 4), (10, 4, 1), (10, 4, 3), (13, 5, 2)],
)
def test_dual_steps_are_those_of_plain_loops(
    num_tokens: int, num_experts: int, k: int, steps: int, clamp: bool
) -> None:
    """Of valid tokens; from prices that there are already."""
    scores = torch.randn(num_tokens + 3, num_experts).double().softmax(-1)
    start = 0.1 * torch.rand(num_experts).double()
    valid = torch.randperm(num_tokens + 3) < num_tokens
    found = dual_steps(scores, valid, start, k, steps, clamp)
    want = plain_steps(scores[valid].tolist(), start.tolist(), k, steps, clamp)
    torch.testing.assert_close(
        found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14
    )
    alone = dual_steps(scores[valid], valid[valid], start, k, steps, clamp)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_plain_loops(top_k: int) -> None:
    """Prices have no gradient; weights of several experts are normalised."""
    layer = layer_with(4, top_k).double()
    x = torch.randn(11, 16).double().requires_grad_()
    probs = (x @ layer.router.weight.T).softmax(-1)
    price = plain_steps(probs.tolist(), [0.0] * 4, top_k, 4, False)
    rows = []
    for token, row in zip(x, probs, strict=True):
        chosen = sorted(range(4), key=lambda e: (-(row[e].item() - price[e]), e))[:top_k]
        total = sum(row[e] for e in chosen) if top_k > 1 else 1.0
        outputs = [reference.expert_output(layer.bank, token, e) for e in chosen]
        rows.append(sum(row[e] / total * y for e, y in zip(chosen, outputs, strict=True)))
    found, want = layer(x).hidden_states, torch.stack(rows)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream, leaves = torch.randn_like(want), (x, layer.router.weight)
    grads = [torch.autograd.grad((value * upstream).sum(), leaves) for value in (found, want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_a_step_learns_the_mean_price_of_its_micro_batches() -> None:
    """By their tokens, each from the prices before the step."""
    layer = favoured(steps=2)
    learn(layer, tokens())
    start, parts = layer.router.prices.price.clone(), [tokens(96), tokens(32)]
    tables = [(x @ layer.router.weight.T).softmax(-1).detach() for x in parts]
    found = [dual_steps(t, torch.ones(len(t)).bool(), start, 1, 2, False) for t in tables]
    for x in parts:
        with Collector(layer):
            layer(x)
    assert torch.equal(layer.router.prices.price, start)
    after_step(layer)
    torch.testing.assert_close(layer.router.prices.price, 0.75 * found[0] + 0.25 * found[1])


def test_impossible_options_are_named() -> None:
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        Bip(steps=0)
    with pytest.raises(ValueError, match="sees='all' must be one of batch, before"):
        Bip(sees="all")  # type: ignore[arg-type]
