"""ETR: orthonormal directions, a choice of both sides, a capacity that rises."""

from __future__ import annotations

import pytest
import torch
from decisions import best_of_choosers, decide, kept, layer_of

from etr.moe import attach, set_progress


@pytest.mark.criterion
def test_directions_choice_and_capacity() -> None:
    """Expert directions stay orthonormal within 1e-5 in training; of an expert's choosers the C of
    greatest gate stay, in whatever order the tokens come; C rises from 0.4 to 1.1 of the mean load.
    """
    layer = layer_of("etr")
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    attached = attach(layer, optimizer, total_steps=20)
    before = layer.router.weight.detach().clone()
    for _ in range(20):
        layer(torch.randn(64, 16)).hidden_states.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    attached.detach()
    assert (layer.router.weight - before).abs().max() > 0.1  # it did train
    directions = layer.router.directions(torch.float32)
    assert (directions @ directions.T - torch.eye(4)).abs().max() < 1e-5

    x = torch.randn(64, 16) + 0.5  # uneven: some experts have more choosers than others
    order = torch.randperm(64)
    for progress, capacity in ((0.0, 7), (1.0, 18)):  # ceil(0.4 * 64 / 4), ceil(1.1 * 64 / 4)
        set_progress(layer, progress)
        view = decide(layer, x)
        chosen = view.routing.routing_map()
        assert (chosen.sum(0) > capacity).any()  # somebody has to choose
        assert torch.equal(view.routing.scores, view.routing.probs)  # by gate, not by cosine
        assert torch.equal(kept(view), best_of_choosers(view, capacity))
        assert torch.equal(kept(decide(layer, x[order])), kept(view)[order])
