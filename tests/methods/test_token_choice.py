"""Token choice: Switch at one expert a token, Mixtral at two."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of


def decision(top_k: int) -> tuple[list[int], list[float]]:
    """Experts and weights of one token whose logits are 1, 2, 0."""
    layer = layer_of("token_choice", num_experts=3, top_k=top_k, capacity="none")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3, 16))
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([1.0, 2.0, 0.0])
    view = decide(layer, x)
    return view.routing.expert.tolist(), view.selection.combine_weight.tolist()


@pytest.mark.criterion
def test_switch_and_mixtral() -> None:
    """Logits 1, 2, 0 give the top 1 expert 1 with weight 0.6652, and the top 2 experts 1 and 0
    with weights 0.7311 and 0.2689."""
    experts, weights = decision(1)
    assert experts == [1]
    assert weights == pytest.approx([0.66524], abs=1e-5)
    experts, weights = decision(2)
    assert experts == [1, 0]
    assert weights == pytest.approx([0.73106, 0.26894], abs=1e-5)
