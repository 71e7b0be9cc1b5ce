"""The fixed-capacity path has static shapes: it runs where no number can be read at all."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import etr
from etr.moe import ROUTERS, RoutingContext
from etr.moe.experts import EXPERT_BACKENDS, auto_backend

T = 32


def step(router: str, backend: str) -> torch.Tensor:
    """Forward and backward on fake tensors, which have shapes but no values."""
    with FakeTensorMode():
        config = etr.MoEConfig(
            hidden_size=16,
            intermediate_size=8,
            num_experts=4,
            router=router,
            capacity=etr.capacity.Factor(capacity_factor=0.7),
            backend=backend,
        )
        layer, x = etr.MoE(config), torch.randn(T, 16, requires_grad=True)
        ids = torch.randint(0, 9, (T,))
        mask = torch.rand(T) > 0.5
        output = layer(x, RoutingContext(token_ids=ids, valid_mask=mask))
        (output.hidden_states.sum() + sum(output.losses.values())).backward()
        assert x.grad is not None
        assert layer.experts.down_proj.grad is not None
        return output.hidden_states


@pytest.mark.parametrize("router", ROUTERS)
def test_the_padded_path_reads_nothing_from_the_device(router: str) -> None:
    assert step(router, "bmm").shape == (T, 16)


def test_a_ragged_path_would_be_noticed() -> None:
    with pytest.raises(DynamicOutputShapeException):
        step("etr", "loop")


@pytest.mark.parametrize(
    ("device", "padded", "name"),
    [
        ("cpu", False, "grouped_mm"),
        ("cuda", False, "grouped_mm"),
        ("cpu", True, "grouped_mm"),
        ("cuda", True, "bmm"),
    ],
)
def test_the_automatic_choice(device: str, padded: bool, name: str) -> None:
    assert auto_backend(device, padded) == name
    assert name in EXPERT_BACKENDS
