"""The lower bound against its formula."""

from __future__ import annotations

import math

import pytest
import torch

from etr.moe import Collector, MoE, MoEConfig, RoutingContext, after_step
from etr.moe.capacity import Factor
from etr.moe.lower_bound import erfc_bound


@pytest.mark.parametrize("affinity", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("hidden_size", [64, 256])
def test_lower_bound(hidden_size: int, affinity: float) -> None:
    z2 = hidden_size * affinity**2 / (2 - affinity**2)
    d = torch.tensor(affinity, dtype=torch.float64)
    erfc = float(erfc_bound(hidden_size, 8, d))
    assert erfc == pytest.approx(1 / (8 * math.erfc(math.sqrt(z2))), rel=1e-9)


def test_a_layer_with_a_floor_learns_the_affinity_of_its_last_step() -> None:
    capacity = Factor(capacity_factor=0.2, floor="erfc")
    config = MoEConfig(
        hidden_size=64, intermediate_size=4, num_experts=4, router="etr_paper", capacity=capacity
    )
    layer = MoE(config)
    x = torch.randn(400, 64)
    x[:, :16] += 0.3
    found = []
    for _ in range(2):
        limit = layer.keep(*layer.route(x, RoutingContext())).limit.capacity
        assert limit is not None
        found.append(int(limit[0]))
        with Collector(layer):
            layer(x)
        after_step(layer)
    affinity = float(layer.calibration.affinity_p99)
    bound = 1 / (4 * math.erfc(math.sqrt(64 * affinity**2 / (2 - affinity**2))))
    assert bound > 20
    assert found == [20, min(100, math.ceil(bound))]
