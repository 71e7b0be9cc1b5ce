"""Compositions on their own: configs as text, and what they refuse to have learned."""

from __future__ import annotations

import pytest
import torch

from etr.model import COMPOSITIONS
from etr.model.composition import PromptComposition, Prompts, TokenComposition, check_shapes
from etr.table import config_to_dict

BY_PROMPT = [name for name, kind in COMPOSITIONS.items() if issubclass(kind, PromptComposition)]
BY_TOKEN = [name for name, kind in COMPOSITIONS.items() if issubclass(kind, TokenComposition)]


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_reads_back(name: str) -> None:
    composition = COMPOSITIONS.parse(name)
    assert COMPOSITIONS.from_dict(config_to_dict(composition)) == composition


@pytest.mark.parametrize("name", BY_PROMPT)
def test_a_prompt_is_answered_by_itself_and_whatever_pads_it(name: str) -> None:
    category = torch.arange(30) % 3
    ids = torch.randint(3, (30, 10)) + 3 * category[:, None]
    score = torch.randn(30, 4) + 3 * torch.eye(4)[category]
    prompts = Prompts(ids=ids, category=category, score=score.double())
    composition = COMPOSITIONS.parse(name)
    assert isinstance(composition, PromptComposition)
    kept, learned = composition.learn(prompts, prompts, torch.ones(4).double(), 12)
    composition.check(learned, len(kept), 12)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    whole = composition.choose(learned, ids, everywhere)
    assert len(whole.unique()) > 1
    pad = torch.full((1, 5), 11)
    for place in range(30):
        row = torch.cat([pad, ids[place : place + 1]], 1)
        valid = torch.arange(15)[None] >= 5
        assert composition.choose(learned, row, valid).item() == whole[place]
    with pytest.raises(ValueError, match="learned tensor"):
        composition.check(learned, len(kept), 13)
    with pytest.raises(ValueError, match="learned tensors are"):
        composition.check({}, len(kept), 12)


@pytest.mark.parametrize("name", BY_TOKEN)
def test_each_place_is_combined_by_itself(name: str) -> None:
    composition = COMPOSITIONS.parse(name)
    assert isinstance(composition, TokenComposition)
    own, choice = torch.randn(3, 5, 11), torch.randn(3, 5, 4)
    members = torch.randn(3, 5, 4, 11).log_softmax(-1)
    whole = composition.combine(own, choice, members)
    assert whole.shape == (3, 5, 11)
    for place in range(5):
        part = slice(1, 2), slice(place, place + 1)
        one = composition.combine(own[part], choice[part], members[part])
        assert torch.equal(one[0, 0], whole[1, place])


def test_shapes_are_named() -> None:
    check_shapes({"a": torch.ones(2, 3)}, {"a": (2, None)})
    for shape in ((2,), (3, 3)):
        with pytest.raises(ValueError, match=r"'a' has shape \(2, 3\); it must be \("):
            check_shapes({"a": torch.ones(2, 3)}, {"a": shape})
