"""Expert choice: experts pick from the whole batch."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, kept, layer_of

from etr.methods import METHODS


@pytest.mark.criterion
def test_experts_take_their_best() -> None:
    """At capacity factor 1 each of 4 experts takes the 16 of 64 tokens to which it gives the
    greatest probability (MaxVio = 0), and a later token can take an earlier one's place."""
    layer = layer_of("expert_choice", capacity="factor:capacity_factor=1")
    with torch.no_grad():
        layer.router.weight[0] *= 3  # a favourite, which changes no count
    x = torch.randn(64, 16)
    view = decide(layer, x)
    want = torch.zeros(64, 4, dtype=torch.bool)
    want.scatter_(0, view.routing.probs.topk(16, dim=0).indices, True)
    assert torch.equal(kept(view), want)
    later = x.clone()
    later[32:] = torch.randn(32, 16) * 2
    assert not torch.equal(kept(decide(layer, later))[:32], want[:32])
    assert METHODS["expert_choice"].causal is False
