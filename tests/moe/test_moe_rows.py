"""Indices that are copied to a device once."""

from __future__ import annotations

import pytest
import torch

from etr.moe import MoE, MoEConfig
from etr.moe.rows import Index


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a tensor was made on the host")


@pytest.mark.parametrize(
    "options", [{"experts": "merged:of=0+1+0+2"}, {"router": "projection:of=0+1+0+2"}]
)
def test_a_forward_makes_no_tensor_of_numbers_on_the_host(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each would be a copy that waits."""
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
    layer, x = MoE(MoEConfig(**sizes, capacity="none", **options)), torch.randn(5, 16)
    with torch.inference_mode():  # what is made then must serve training too
        want = layer(x).hidden_states.clone()
    monkeypatch.setattr(torch, "tensor", refuse)
    y = layer(x.requires_grad_()).hidden_states
    y.sum().backward()
    assert torch.equal(y, want)


def test_an_index_is_made_once_for_a_device() -> None:
    index = Index([2, 0, 2])
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert index.on(cpu).tolist() == [2, 0, 2]
    assert index.on(cpu) is index.on(cpu)
    assert index.on(meta).is_meta
    assert not index.on(cpu).is_meta
