"""dMoE: the smallest set that holds a share of the votes."""

from __future__ import annotations

import pytest
import torch
from blocks import layer, route, same, weights, worked

from etr.methods.dmoe import DMoE
from etr.moe import RoutingContext
from etr.moe.serving import SERVING


def votes_by_hand(probs: torch.Tensor, k: int) -> torch.Tensor:
    """Of one block, in a plain loop."""
    votes = torch.zeros(probs.shape[1], dtype=torch.float64)
    for row in probs:
        for expert in row.argsort(descending=True)[:k]:
            votes[expert] += row[expert]
    return votes / votes.sum()


@pytest.mark.criterion
def test_the_core_is_the_smallest_that_holds_tau() -> None:
    """A block's experts hold tau = 0.5, 0.7 or 0.9 of its votes and no smaller set does; tau = 1,
    or a token alone in its block, is the model's own top k, bit for bit."""
    one, x = layer(), torch.randn(32, 16, dtype=torch.float64)
    own = route(one, x, "dropless")
    assert own.probs is not None
    votes = votes_by_hand(own.probs, 2)
    for tau in (0.5, 0.7, 0.9):
        used = route(one, x, f"dmoe:tau={tau}").expert.unique()
        assert votes[used].sum() >= tau - 1e-6
        assert votes.topk(len(used) - 1).values.sum() < tau - 1e-6
    assert same(route(one, x, "dmoe:tau=1"), own)
    assert same(route(one, x, "dmoe:tau=0.1,block=1"), own)


def test_worked_example() -> None:
    """Sigmoids as weights, votes .38, .36, .16, .10."""
    one, x = worked("sigmoid")
    first = [{0: 0.625, 1: 0.375}, {1: 0.8571, 0: 0.1429}, {0: 0.9, 1: 0.1}]
    assert weights(one, x, "dmoe:tau=0.7") == first
    assert weights(one, x, "dmoe:tau=0.8") == [*first[:2], {0: 0.5294, 2: 0.4706}]


def test_votes_that_meet_tau_exactly_are_enough() -> None:
    """.5, .25, .125, .125 at .75: two experts, and not three."""
    votes = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    assert DMoE(tau=0.75).core(votes, 1).tolist() == [[True, True, False, False]]
    assert DMoE(tau=0.75, least=3).core(votes, 1).tolist() == [[True, True, True, False]]
    assert DMoE(tau=0.1).core(votes, 2).tolist() == [[True, True, False, False]]


def test_a_selection_bias_votes_and_does_not_weigh() -> None:
    options = {"router": "token_choice:selection_bias=true,gate=sigmoid", "normalize": "chosen"}
    one, x = layer(4, **options), torch.randn(8, 16, dtype=torch.float64)
    with torch.no_grad():
        one.router.selection.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 5.0]))
    routing = route(one, x, "dmoe:tau=0.5")
    assert routing.expert.unique().tolist() == [2, 3]
    assert routing.gate.max() < 1


def test_padding_has_no_vote_and_no_nan() -> None:
    one, x = layer(), torch.randn(64, 16, dtype=torch.float64)
    mask = torch.arange(64) < 32  # the second block is padding alone
    routing = one.route(x, RoutingContext(serving="dmoe", valid_mask=mask))[0]
    assert torch.equal(routing.expert[:64], route(one, x[:32], "dmoe").expert)
    assert (routing.expert[64:] == 16).all()


@pytest.mark.parametrize("option", ["tau=0", "least=0", "block=0"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        SERVING.parse(f"dmoe:{option}")
