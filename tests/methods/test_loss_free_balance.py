"""Balance without a loss: a bias of the selection, moved against the load."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn

from etr.moe import MoE
from etr.moe.stats import max_violation


def favoured(**options: object) -> MoE:
    """Eight experts; all tokens of `tokens` favour the first."""
    layer = layer_of("loss_free_balance", num_experts=8, capacity="none", **options)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.25)
        layer.router.weight[:, 0] = 0.0
        layer.router.weight[0, 0] = 1.5
    return layer


def tokens() -> torch.Tensor:
    x = torch.randn(512, 16)
    x[:, 0] = 1.0
    return x


def violation(layer: MoE) -> float:
    return float(max_violation(decide(layer, tokens()).routing.num_choices_per_expert()))


@pytest.mark.criterion
def test_the_bias_alone_evens_the_load() -> None:
    """Where one of 8 experts is the favourite of all tokens, the bias alone brings MaxVio from
    over 2 to under 0.25, and combine weights are those of the scores without it."""
    layer = favoured()
    assert violation(layer.eval()) > 2
    layer.train()
    for _ in range(500):
        assert not learn(layer, tokens())
    assert violation(layer.eval()) < 0.25
    view = decide(layer, tokens())
    logits = view.x @ layer.router.weight.T
    chosen = logits.sigmoid()[view.routing.token, view.routing.expert]
    assert torch.allclose(view.selection.combine_weight, chosen)
    assert (logits.argmax(-1) != view.routing.expert).any()  # the bias did change choices


def test_one_step_by_hand() -> None:
    """Loads 5, 1, 2, 0 of 8 tokens, mean 2: the bias moves by -u, u, 0, u."""
    layer = layer_of("loss_free_balance")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    x = torch.zeros(8, 16)
    x[range(8), [0, 0, 0, 0, 0, 1, 2, 2]] = 1.0
    learn(layer, x)
    want = torch.tensor([-1.0, 1.0, 0.0, 1.0]) * 0.001
    assert torch.equal(layer.router.selection.bias, want)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    """Scores .5, .4, .1 with bias -.2, 0, 0: expert 1, weight .4."""
    layer = layer_of("loss_free_balance", num_experts=3, capacity="none")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3, 16))
        layer.router.selection.bias[0] = -0.2
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([0.5, 0.4, 0.1]).logit()
    view = decide(layer, x)
    assert view.routing.expert.tolist() == [1]
    assert view.selection.combine_weight.tolist() == pytest.approx([0.4])
