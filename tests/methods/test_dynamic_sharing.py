"""Dynamic expert sharing: a core of a fixed size, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from blocks import layer, route, same, weights, worked

from etr.moe import RoutingContext
from etr.moe.serving import SERVING


@pytest.mark.criterion
def test_the_core_bounds_the_experts_of_a_block() -> None:
    """A block of 32 tokens uses at most max(k, floor(beta E)) of 16 experts, for beta = 1/4, 1/2
    and 3/4; beta = 1, or a token alone in its block, is the model's own top k, bit for bit."""
    one, x = layer(), torch.randn(64, 16, dtype=torch.float64)
    for beta, most in ((0.25, 4), (0.5, 8), (0.75, 12), (0.01, 2)):
        used = route(one, x, f"dynamic_sharing:beta={beta}").expert.view(2, -1)
        assert [len(block.unique()) for block in used] == [most, most]
    own = route(one, x, "dropless")
    assert same(route(one, x, "dynamic_sharing:beta=1"), own)
    assert same(route(one, x, "dynamic_sharing:beta=0.25,block=1"), own)
    assert same(route(one, x, "dynamic_sharing:beta=0.25", list(range(64))), own)


def test_worked_example() -> None:
    """Votes .95, .9, .4, .25: experts 0 and 1, two in the place of four."""
    found = weights(*worked("softmax"), "dynamic_sharing:beta=0.5")
    assert found == [{0: 0.625, 1: 0.375}, {1: 0.8571, 0: 0.1429}, {0: 0.9, 1: 0.1}]


def test_labels_make_the_blocks() -> None:
    """Whatever their numbers and wherever their tokens stand; blocks do not see each other."""
    one, x = layer(), torch.randn(12, 16, dtype=torch.float64)
    block = [7, 3] * 6
    found = route(one, x, "dynamic_sharing:beta=0.2", block).expert.view(12, 2)
    for first in (0, 1):
        alone = route(one, x[first::2], "dynamic_sharing:beta=0.2", [0] * 6)
        assert torch.equal(found[first::2], alone.expert.view(6, 2))
        assert len(alone.expert.unique()) == 3


def test_padding_has_no_vote() -> None:
    one, x = layer(), torch.randn(8, 16, dtype=torch.float64)
    mask = torch.tensor([True] * 5 + [False] * 3)
    context = RoutingContext(serving="dynamic_sharing:beta=0.2", valid_mask=mask)
    found = one.route(x, context)[0].expert.view(8, 2)
    alone = route(one, x[:5], "dynamic_sharing:beta=0.2").expert.view(5, 2)
    assert torch.equal(found[:5], alone)
    assert (found[5:] == 16).all()
    nobody = RoutingContext(serving="dynamic_sharing", valid_mask=torch.zeros(8, dtype=torch.bool))
    assert (one(x, nobody).hidden_states == 0).all()


@pytest.mark.parametrize("option", ["beta=0", "beta=1.5", "block=0"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        SERVING.parse(f"dynamic_sharing:{option}")
