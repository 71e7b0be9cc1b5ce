"""One optimizer step: old gradients go, an error leaves the weights as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from etr.train.step import take_step


def test_a_step_takes_only_its_own_gradient_at_the_given_rate() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    weight.grad = torch.tensor([100.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def backward() -> str:
        (2 * weight).sum().backward()
        return "found"

    assert take_step(optimizer, backward, rate=0.5) == "found"
    assert weight.item() == 2.0
    assert take_step(optimizer, backward) == "found"  # the rate stays
    assert weight.item() == 1.0
    assert weight.grad is not None
    assert weight.grad.item() == 2.0


def test_an_error_on_the_way_changes_no_weight() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    def backward() -> None:
        weight.sum().backward()
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        take_step(optimizer, backward)
    assert weight.item() == 3.0
