"""ETR as published: block vectors, ranking by cosine, a capacity that falls."""

from __future__ import annotations

import pytest
import torch
from decisions import best_of_choosers, decide, kept, layer_of

from etr.moe import set_progress


@pytest.mark.criterion
def test_affinity_ranking_and_capacity() -> None:
    """A token that is an expert's block vector has affinity 1 with that expert and 0 with the
    others; of an expert's choosers the C of greatest cosine stay; C falls from 1.1 to 0.6 of the
    mean load."""
    layer = layer_of("etr_paper")
    blocks = torch.eye(4).repeat_interleave(4, dim=1) * 4 / 16  # w_e = E / H on its block
    assert torch.allclose(layer.router.affinity(blocks), torch.eye(4), atol=1e-6)
    assert not list(layer.router.parameters())

    x = torch.randn(64, 16)
    x[:, :4] += 0.7  # most tokens choose the first expert
    for progress, capacity in ((0.0, 18), (1.0, 10)):  # ceil(1.1 * 64 / 4), ceil(0.6 * 64 / 4)
        set_progress(layer, progress)
        view = decide(layer, x)
        assert view.routing.routing_map().sum(0)[0] > capacity
        assert torch.allclose(view.routing.scores, layer.router.affinity(x))
        assert torch.equal(kept(view), best_of_choosers(view, capacity))
