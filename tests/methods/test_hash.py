"""Hash layers: nothing learned, the id decides."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of

from etr.moe import RoutingContext


@pytest.mark.criterion
def test_ids_decide_and_spread_evenly() -> None:
    """Equal token ids take equal experts whatever the tokens hold, k = 2 different ones with
    weight 1/2; the ids 0 to 65,535 load 8 experts evenly within 2 %."""
    layer = layer_of("hash", num_experts=8, top_k=2, capacity="none")
    ids = torch.arange(65536)
    views = [
        decide(layer, torch.randn(65536, 16), RoutingContext(token_ids=order))
        for order in (ids, ids.flip(0))
    ]
    first, second = (view.routing.expert.view(-1, 2) for view in views)
    assert torch.equal(first, second.flip(0))
    assert (first[:, 0] != first[:, 1]).all()
    assert torch.equal(views[0].selection.combine_weight, torch.full((131072,), 0.5))
    load = views[0].routing.num_choices_per_expert() / (2 * 65536 / 8)
    assert (load - 1).abs().max() < 0.02
    assert (load != 1).any()  # by chance, not by construction
