"""What learns once a step: exact resume, frozen in eval, counted once however a step is run.

That ranks learn what one rank with all tokens learns is held in tests/distributed, by every cell.
"""

from __future__ import annotations

import pytest
import torch
from cells import ALL, Cell, T, context, ids, tokens
from test_conformance_transforms import Block
from torch import Tensor

from etr.moe import Collector, MoE, after_step
from etr.moe.learner import Learner

LEARNERS = [(cell, learner) for cell in ALL for learner in cell.layer().learners()]


def _one_each() -> list[Cell]:
    """One cell for every configuration of every learner that moves."""
    found: dict[str, Cell] = {}
    for cell, learner in LEARNERS:
        config = getattr(learner, "config", None) or vars(learner).get("update")
        if learner.moves:
            found.setdefault(f"{type(learner).__name__} {config}", cell)
    return list(dict.fromkeys(found.values()))


CELLS = _one_each()


def state_of(layer: MoE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name].nan_to_num(-1), value.nan_to_num(-1)), name


def step(layer: MoE, *batches: Tensor, recompute: bool = False) -> None:
    """One optimizer step's micro-batches, their backward passes too; no weight changes."""
    block = Block(layer, recompute)
    for x in batches:
        with Collector(block):
            y = block(x, token_ids=torch.arange(T))
        y.sum().backward()
    after_step(layer)


def test_what_never_moves_learns_nothing() -> None:
    """So that the cells below leave no learner of the tables out."""
    moving = {type(learner) for _, learner in LEARNERS if learner.moves}
    for _, learner in LEARNERS:
        assert type(learner) in moving or type(learner).after_step is Learner.after_step


@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_a_loaded_layer_goes_on_as_the_saved_one(cell: Cell) -> None:
    layer, batches = cell.layer(), [tokens() for _ in range(5)]
    for x in batches[:3]:
        step(layer, x)
    other = cell.layer()
    other.load_state_dict(layer.state_dict())
    for x in batches[3:]:
        for one in (layer, other):
            step(one, x)
    assert_equal(state_of(other), state_of(layer))
    for one in (layer, other):
        one.train()
    token_ids = torch.arange(T)
    y, again = (one(batches[0], context(T, token_ids=token_ids)) for one in (layer, other))
    assert torch.equal(y.hidden_states, again.hidden_states)


@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_it_learns_in_training_and_stands_still_in_eval(cell: Cell) -> None:
    layer = cell.layer()
    before = state_of(layer)
    step(layer, tokens())
    learned = state_of(layer)
    assert any(not torch.equal(learned[name], before[name]) for name in before)
    layer.eval()
    step(layer, tokens())
    assert_equal(state_of(layer), learned)


@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_micro_batches_count_once_each_also_where_they_are_recomputed(cell: Cell) -> None:
    """Against forwards without a backward pass."""
    layer, other = cell.layer(), cell.layer()
    other.load_state_dict(layer.state_dict())
    batches = [tokens(), tokens()]
    step(layer, *batches, recompute=True)
    block = Block(other, recompute=False)
    for x in batches:
        with torch.enable_grad(), Collector(block) as collector:
            block(x, token_ids=torch.arange(T))
        (stats,) = collector.stats()
        assert int(stats["num_forwards"]) == 1
    assert int(other.pending["num_forwards"]) == len(batches)
    after_step(other)
    assert_equal(state_of(layer), state_of(other))


@pytest.mark.parametrize("cell", CELLS, ids=ids)
def test_a_forward_alone_changes_nothing(cell: Cell) -> None:
    layer = cell.layer()
    before = state_of(layer)
    layer(tokens(), context())
    assert_equal(state_of(layer), before)
