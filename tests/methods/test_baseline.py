"""The baseline: one learned expert a token, first come first served."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, kept, layer_of


@pytest.mark.criterion
def test_the_first_stay() -> None:
    """Of 16 tokens that all choose one of 4 experts the first 5 stay, ceil(1.1 * 16 / 4), and the
    others get output 0."""
    layer = layer_of("baseline")
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2, 0] = 1.0
    x = torch.randn(16, 16)
    x[:, 0] = torch.arange(1.0, 17.0)  # the last token has the greatest gate, and is dropped
    want = torch.zeros(16, 4, dtype=torch.bool)
    want[:5, 2] = True
    assert torch.equal(kept(decide(layer, x)), want)
    y = layer(x).hidden_states
    assert y[:5].abs().sum(-1).min() > 0
    assert torch.equal(y[5:], torch.zeros(11, 16))
