"""Filling a block: every policy, with made-up predictions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from etr.model import UNMASKINGS
from etr.model.unmasking import Quota, Unmasking, fill_block

V, MASK = 7, 6


def predictions(rows: int, size: int, sharp: float) -> Tensor:
    return sharp * torch.randn(rows, size, V, generator=torch.Generator().manual_seed(size))


def filled(
    policy: Unmasking, logits: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor, int, list[Tensor]]:
    """Tokens, steps, and what was shown after each."""
    rows, size, _ = logits.shape
    hidden = torch.ones(rows, size, dtype=torch.bool) if hidden is None else hidden
    tokens = torch.zeros(rows, size, dtype=torch.int64).masked_fill(hidden, MASK)
    seen = []

    def predict(tokens: Tensor, hidden: Tensor, step: int) -> Tensor:
        assert torch.equal(tokens == MASK, hidden)
        assert step == len(seen)
        seen.append(tokens)
        return logits

    found, steps = fill_block(predict, tokens, hidden, policy, mask=MASK)
    return found, steps, [*seen[1:], found]


@pytest.mark.parametrize("name", UNMASKINGS)
@pytest.mark.parametrize("sharp", [0.1, 3.0, 30.0])
def test_every_policy_fills_a_block_in_at_most_as_many_steps_as_places(name, sharp) -> None:
    policy, logits = UNMASKINGS.parse(name), predictions(3, 9, sharp)
    hidden = torch.ones(3, 9, dtype=torch.bool)
    hidden[0, :4] = False
    found, steps, shown = filled(policy, logits, hidden)
    assert 1 <= steps <= 9
    wanted = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).argmax(-1)
    assert torch.equal(found, torch.where(hidden, wanted, 0))
    for before, after in itertools.pairwise(shown):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept])  # unmasked tokens stay
    for row in range(3):  # rows do not touch each other
        alone, count, _ = filled(policy, logits[row, None], hidden[row, None])
        assert torch.equal(alone[0], found[row])
        assert count <= steps


def test_a_quota_is_the_steps_part_of_the_block() -> None:
    """10 places in 4 steps: 3, 3, 2, 2; the most confident first, of equal ones the left."""
    even = torch.zeros(1, 10, V)
    found = [int((tokens != MASK).sum()) for tokens in filled(Quota(steps=4), even)[2]]
    assert found == [3, 6, 8, 10]
    first = filled(Quota(steps=4), even)[2][0]
    assert (first[0, :3] != MASK).all()
    sharp = torch.zeros(1, 10, V)
    sharp[0, [1, 4, 5, 6], 2] = 50.0
    assert (filled(Quota(steps=4), sharp)[2][0] != MASK).nonzero()[:, 1].tolist() == [1, 4, 5, 6]
    assert filled(Quota(steps=4, threshold=1.0), sharp)[1] == 4
    assert filled(Quota(steps=1), even)[1] == 1
    assert filled(Quota(steps=50), even)[1] == 10


def test_the_part_counts_what_a_prompt_left() -> None:
    hidden = torch.tensor([[False] * 6 + [True] * 4])
    assert filled(Quota(steps=4), torch.zeros(1, 10, V), hidden)[1] == 4


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        Quota(steps=0)
