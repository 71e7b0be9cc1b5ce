"""ExpertCondenser: a bias towards what is used, and experts that always run."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor

from etr.moe import MoE


def with_probs(*probs: float, text: str = "", **options: object) -> tuple[MoE, Tensor]:
    """A layer in float64 that gives one token these probabilities."""
    count = len(probs)
    router = f"expert_condenser:{text}" if text else "expert_condenser"
    layer = layer_of("expert_condenser", router=router, num_experts=count, **options).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(count, 16))
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, :count] = torch.tensor(probs).log()
    return layer, x


def test_worked_weights_of_a_condenser() -> None:
    """p = (.5, .3, .15, .05), k = 2, expert 3 always on: .5, .3, .05; over their sum .5882, ..."""
    for normalize, want in (("none", [0.5, 0.3, 0.05]), ("chosen", [0.5882, 0.3529, 0.0588])):
        layer, x = with_probs(
            *(0.5, 0.3, 0.15, 0.05), text="condensers=1", top_k=2, normalize=normalize
        )
        view = decide(layer, x)
        assert view.routing.expert.tolist() == [0, 1, 3]
        assert view.selection.combine_weight.tolist() == pytest.approx(want, abs=5e-5)


def test_a_condenser_that_was_chosen_runs_once() -> None:
    layer, x = with_probs(0.05, 0.15, 0.3, 0.5, text="condensers=2", top_k=1, normalize="none")
    view = decide(layer, x)
    assert view.routing.expert.tolist() == [3, 2, 4]
    assert view.selection.combine_weight.tolist() == pytest.approx([0.5, 0.3, 0.0])
    x = torch.randn(30, 16, dtype=torch.float64)
    load = decide(layer, x).routing.num_choices_per_expert()
    assert load[2:].tolist() == [30, 30]


def test_the_bias_is_in_weights_too_and_stands_still_in_eval() -> None:
    layer, x = with_probs(0.25, 0.25, 0.25, 0.25, text="condensers=0", top_k=1)
    with torch.no_grad():
        layer.router.usage.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
    view = decide(layer, x)
    want = torch.tensor([0.0, 1, 0, 0]).softmax(0)[1]
    assert view.routing.expert.tolist() == [1]
    assert float(view.selection.combine_weight.detach()) == pytest.approx(float(want))
    before = layer.router.usage.bias.clone()
    learn(layer.eval(), x)
    assert torch.equal(layer.router.usage.bias, before)


def test_one_step_by_hand() -> None:
    """Usage in proportion 5, 1, 1, 1: +u, -u, -u, -u; even usage: nothing."""
    layer, x = with_probs(5 / 8, 1 / 8, 1 / 8, 1 / 8, text="rate=0.1")
    learn(layer, x)
    want = torch.tensor([0.1, -0.1, -0.1, -0.1])
    torch.testing.assert_close(layer.router.usage.bias, want)
    even = layer_of("expert_condenser", router="expert_condenser:rate=0.1")
    learn(even, torch.zeros(4, 16))
    assert not even.router.usage.bias.any()


def test_without_rate_and_condensers_it_is_token_choice_bit_for_bit() -> None:
    text = "expert_condenser:rate=0,condensers=0"
    layer = layer_of("expert_condenser", router=text, top_k=2)
    plain = layer_of("token_choice", top_k=2, capacity="none")
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(32, 16)
    for _ in range(2):
        assert torch.equal(layer(x).hidden_states, plain(x).hidden_states)
        learn(layer, x)
    assert not layer.router.usage.bias.any()


@pytest.mark.parametrize("text", ["rate=-1", "condensers=-1", "condensers=5"])
def test_options_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match=text.partition("=")[0]):
        layer_of("expert_condenser", router=f"expert_condenser:{text}")


@pytest.mark.criterion
def test_tails_fall_silent_and_condensers_learn() -> None:
    """Of 16 experts that all have over 1 % of the tokens, 10 or fewer do after 100 steps of 0.02,
    and all 16 without steps; condensers have a gradient in every step."""
    generator = torch.Generator().manual_seed(0)
    logits = 1.5 * torch.randn(4096, 16, generator=generator) + torch.linspace(1, -1, 16)
    for rate, silent in ((0.02, True), (0.0, False)):
        text = f"expert_condenser:rate={rate}"
        layer = layer_of("expert_condenser", router=text, num_experts=16, top_k=2)
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(16))
        alone = layer_of("expert_condenser", router=f"{text},condensers=0", num_experts=16, top_k=2)
        alone.router.load_state_dict(layer.router.state_dict())
        for step in range(100):
            learn(layer, logits)
            if step % 20 == 0:
                layer.zero_grad()
                layer(logits[:64]).hidden_states.sum().backward()
                grad = layer.experts.down_proj.grad
                assert grad is not None
                assert (grad[14:].flatten(1).abs().max(1).values > 0).all()
        alone.router.load_state_dict(layer.router.state_dict())
        load = decide(alone, logits).routing.num_choices_per_expert()
        used = int((load > 0.01 * 4096).sum())
        assert used <= 10 if silent else used == 16
