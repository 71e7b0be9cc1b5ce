"""Sequences that use the same experts run together."""

from __future__ import annotations

import torch

from etr.systems.regroup import experts_of_batches, regrouped, uses

CHOICES = torch.tensor([[[0, 1], [0, -1], [2, 3], [1, 0]], [[3, 3], [2, 3], [1, -1], [3, 2]]])
SEQUENCE = torch.tensor([4, 4, 7, 9])


def test_uses_are_counted_by_sequence_and_layer() -> None:
    found = uses(CHOICES, SEQUENCE, 4)
    first = [[[2, 1, 0, 0], [0, 0, 1, 3]], [[0, 0, 1, 1], [0, 1, 0, 0]]]
    assert found.tolist() == [*first, [[1, 1, 0, 0], [0, 0, 1, 1]]]
    assert uses(CHOICES[:, :0], SEQUENCE[:0], 4).shape == (0, 2, 4)


def test_sequences_of_the_same_experts_meet() -> None:
    """In order batches use 4 and 3, then 2 and 2 experts of the layers; regrouped 2, 2 and 2, 1."""
    used = uses(CHOICES, SEQUENCE, 4)
    assert experts_of_batches(used, [[0, 1], [2]]) == (4 + 3 + 2 + 2) / 4
    batches = regrouped(used.flatten(1), 2)
    assert batches == [[0, 2], [1]]
    assert experts_of_batches(used, batches) == (2 + 2 + 2 + 1) / 4


def test_every_sequence_is_in_one_batch_and_the_last_may_be_smaller() -> None:
    batches = regrouped(torch.rand(11, 8), 4)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert sorted(number for batch in batches for number in batch) == list(range(11))
