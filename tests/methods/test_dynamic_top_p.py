"""Dynamic top-p: as many experts as a probability needs."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of
from torch import Tensor

from etr.methods.dynamic_top_p import TopP
from etr.moe import MoE, reference

PROBS = [0.35, 0.3, 0.2, 0.15]


def layer_with(p: float, **options: object) -> MoE:
    layer = layer_of("dynamic_top_p", router=TopP(p=p), **options)
    return layer.double()


def chosen(p: float, probs: list[float]) -> tuple[list[int], list[float], float]:
    """Experts and weights of a token with given probabilities, and its entropy."""
    layer = layer_with(p, losses="entropy:weight=1")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, :4] = torch.tensor(probs).double().log()
    view = decide(layer, x)
    used = view.routing.valid
    weights = view.selection.combine_weight[used].tolist()
    return view.routing.expert[used].tolist(), weights, layer(x).losses["entropy"].item()


@pytest.mark.criterion
@pytest.mark.parametrize("p", [0.0, 0.25, 0.4, 0.7, 0.95, 1.0])
def test_the_smallest_set_that_reaches_p(p: float) -> None:
    """The chosen experts hold at least p of the probability, and no smaller set does; p = 0 gives
    one expert and p = 1 all."""
    view = decide(layer_with(p, num_experts=8), 2 * torch.randn(256, 16).double())
    probs, counts = view.routing.probs, view.routing.routing_map().sum(1)
    for row, taken, count in zip(
        probs.tolist(), view.routing.routing_map().tolist(), counts.tolist(), strict=True
    ):
        assert sum(q for q, took in zip(row, taken, strict=True) if took) >= p - 1e-6
        assert sum(sorted(row)[9 - count :]) < p - 1e-6 or count == 1  # the best count - 1
    assert set(counts.tolist()) == {0.0: {1}, 1.0: {8}}.get(p, set(counts.tolist()))


@pytest.mark.parametrize(("p", "count"), [(0, 1), (0.4, 2), (0.65, 2), (0.7, 3), (1, 4), (2, 4)])
def test_by_hand(p: float, count: int) -> None:
    experts, weights, entropy = chosen(p, PROBS)
    assert experts == list(range(count))
    assert weights == pytest.approx(PROBS[:count])
    assert entropy == pytest.approx(1.3351, abs=5e-5)


@pytest.mark.parametrize(("p", "experts"), [(0.25, [0]), (0.4, [0, 1]), (0.5, [0, 1])])
def test_equal_probabilities_go_to_the_first(p: float, experts: list[int]) -> None:
    assert chosen(p, [0.25] * 4)[0] == experts


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("num_tokens", "num_experts"), [(0, 4), (1, 4), (9, 1), (9, 4)])
def test_outputs_losses_and_gradients_are_those_of_plain_loops(
    p: float, num_tokens: int, num_experts: int
) -> None:
    layer = layer_with(p, num_experts=num_experts, losses="balance:weight=1,entropy:weight=1")
    x = torch.randn(num_tokens, 16, dtype=torch.float64, requires_grad=True)
    weight = layer.router.weight

    def plain() -> Tensor:
        y, entropy, choices, mass = x * 0, x.sum() * 0, [0] * num_experts, x.sum() * 0
        rows, table = [], (x @ weight.T).softmax(-1)
        for token, probs in zip(x, table, strict=True):
            out, reached, row = token * 0, 0.0, []
            for e in sorted(range(num_experts), key=lambda e: (-probs[e].item(), e)):
                if row and reached >= p - 1e-6 and p < 1:
                    break
                out = out + probs[e] * reference.expert_output(layer.bank, token, e)
                reached += probs[e].item()
                row.append(e)
            for e in row:
                choices[e] += 1
            rows.append(out)
            entropy = entropy - (probs * probs.log()).sum() / num_tokens
        for e, count in enumerate(choices):
            mass = mass + num_experts * count / max(sum(choices), 1) * table[:, e].sum() / max(
                num_tokens, 1
            )
        y = torch.stack(rows) if rows else y
        return torch.cat((y.flatten(), (entropy + mass)[None]))

    output = layer(x)
    found = torch.cat((output.hidden_states.flatten(), sum(output.losses.values())[None]))
    want = plain()
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(want)
    leaves = (x, weight, layer.experts.gate_up_proj)
    grads = (torch.autograd.grad(v @ upstream, leaves, allow_unused=True) for v in (found, want))
    for got, expected in zip(*grads, strict=True):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_probability_that_underflows_leaves_gradients_finite() -> None:
    layer = layer_of("dynamic_top_p", losses="entropy:weight=1")
    x = (1e4 * torch.randn(8, 16)).requires_grad_()
    layer(x).losses["entropy"].backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("p", [-0.1, float("inf"), float("nan")])
def test_impossible_options_are_named(p: float) -> None:
    with pytest.raises(ValueError, match=f"p={p} must be a probability"):
        TopP(p=p)
