"""Objectives on their own: examples, losses, and the arguments of a forward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from etr.model import OBJECTIVES, Causal, Example, Text
from etr.model.objective import IGNORED, draws
from etr.table import config_to_dict

B, S, V = 3, 10, 17


def a_text(valid: bool = True) -> Text:
    ids = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
    following = ids.roll(-1, 1)
    following[:, -1] = IGNORED
    mask = torch.ones(B, S, dtype=torch.bool)
    if valid:
        mask[0, 6:], following[0, 6:] = False, IGNORED
    return Text(ids=ids, following=following, valid=mask if valid else None)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("valid", [True, False])
def test_every_objective_makes_examples_that_its_losses_fit(name, valid):
    objective = OBJECTIVES.parse(name).masked_by(V - 1)
    assert OBJECTIVES.from_dict(config_to_dict(objective)) == objective
    text = a_text(valid)
    example, again = (objective.example(text, draws(7, 3)) for _ in range(2))
    for field, value in vars(example).items():
        other = getattr(again, field)
        assert value is other or torch.equal(value, other), f"{field} is not the generator's alone"
    shape = example.input_ids.shape
    assert example.labels.shape == example.counted.shape == shape
    assert example.counted.any()
    logits = torch.randn(*shape, V, requires_grad=True)
    losses = objective.losses(logits, example)
    assert losses.shape == (shape.numel(),)
    assert (losses[example.labels.flatten() == IGNORED] == 0).all()
    total = objective.total(logits, example)
    torch.testing.assert_close(total, losses.sum())
    (wanted,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, wanted)
    # Rows do not touch each other.
    part = example.rows(slice(1, 2))
    one = objective.losses(logits[1:2], part)
    torch.testing.assert_close(one, losses.view(shape)[1])


def test_causal_is_next_token_cross_entropy_bit_for_bit():
    text, logits = a_text(), torch.randn(B, S, V)
    example = Causal().example(text, draws(0))
    flat, labels = logits.flatten(0, 1), text.following.flatten()
    for reduction, found in (
        ("sum", Causal().total(logits, example)),
        ("none", Causal().losses(logits, example)),
    ):
        wanted = F.cross_entropy(flat, labels, ignore_index=IGNORED, reduction=reduction)
        assert torch.equal(found, wanted)
    assert Causal().losses(logits.half(), example).dtype == torch.float32
    assert Causal().losses(logits.double(), example).dtype == torch.float64
    assert example.arguments()["attention_mask"].tolist() == text.valid.long().tolist()
    assert list(Causal().example(a_text(False), draws(0)).arguments()) == ["input_ids"]


def test_a_mask_of_pairs_is_added_to_scores_and_routing_keeps_its_own():
    text = a_text()
    pairs = torch.ones(B, S, S, dtype=torch.bool).tril()
    example = Example(
        input_ids=text.ids,
        labels=text.following,
        counted=text.valid,
        valid=text.valid,
        attention=pairs,
        position_ids=torch.arange(S).expand(B, S),
        weight=torch.full((B, S), 0.5),
    )
    found = example.arguments(torch.bfloat16)
    mask = found["attention_mask"]
    assert (mask.shape, mask.dtype) == ((B, 1, S, S), torch.bfloat16)
    assert torch.equal(mask[:, 0] == 0, pairs)
    assert (mask[:, 0][~pairs] == torch.finfo(torch.bfloat16).min).all()
    assert found["routing_context"].valid_mask is text.valid
    assert found["position_ids"] is example.position_ids
    logits = torch.randn(B, S, V)
    halved = Causal().losses(logits, example)
    torch.testing.assert_close(halved * 2, Causal().losses(logits, Causal().example(text, draws())))
    assert example.rows(slice(0, 1)).attention.shape == (1, S, S)


def test_draws_depend_on_the_key_alone():
    def first(*key: object) -> float:
        return float(torch.rand((), generator=draws(*key)))

    assert first(1, 2) == first(1, 2)
    assert len({first(1, 2), first(2, 1), first(1, 2, 0), first("1", 2)}) == 4
