"""Weights and state written in place count from the next forward on, in either mode.

Checkpoints loaded into the tensors of a state dict, moving averages and DDP's buffers come so:
no hook runs, and nobody sets the mode again.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cells import CELLS, Cell, T, context, ids, tokens
from torch import Tensor, nn

from etr.moe import MoE, MoEOutput, attach


def tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def by_copy(target: MoE, source: MoE, folder: Path) -> None:
    with torch.no_grad():
        for new, old in zip(tensors(target), tensors(source), strict=True):
            new.copy_(old)


def by_data(target: MoE, source: MoE, folder: Path) -> None:
    for new, old in zip(tensors(target), tensors(source), strict=True):
        new.data.copy_(old)


def by_checkpoint(target: MoE, source: MoE, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(source.state_dict(), checkpoint_id=folder, no_dist=True)
        dcp.load(target.state_dict(), checkpoint_id=folder, no_dist=True)


def run(layer: MoE) -> MoEOutput:
    """The same tokens in the layer's mode; in eval mode without gradients, as caches need it."""
    torch.manual_seed(8)
    with torch.set_grad_enabled(layer.training):
        return layer(tokens(), context(valid_mask=torch.arange(T) < T - 2))


def in_mode(layer: MoE, training: bool) -> MoE:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(layer).train(training)


def train(layer: MoE, num_steps: int) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    attachment = attach(layer, optimizer, num_steps)
    for _ in range(num_steps):
        output = layer(tokens(64), context(64))
        (output.hidden_states.square().mean() + sum(output.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()


def assert_same(got: MoEOutput, want: MoEOutput) -> None:
    assert torch.equal(got.hidden_states, want.hidden_states)
    for found, expected in ((got.losses, want.losses), (got.stats, want.stats)):
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_a_write_in_place_counts_from_the_next_forward_on(cell: Cell, tmp_path: Path) -> None:
    """Into a layer that has never learned, and back into one that has."""
    fresh, trained = cell.layer(), cell.layer()
    train(trained, 4)
    for training in (False, True):
        for name, start, end in (("learned", fresh, trained), ("forgot", trained, fresh)):
            source = in_mode(end, training)
            want = run(source)
            for write in (by_copy, by_data, by_checkpoint):
                target = in_mode(start, training)
                run(target)  # fills whatever it keeps between forwards
                write(target, source, tmp_path / f"{name}-{training}")
                assert_same(run(target), want)
