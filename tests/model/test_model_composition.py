"""Compositions on their own: configs as text, and what they refuse to have learned."""

from __future__ import annotations

import pytest
import torch

from etr.model import COMPOSITIONS
from etr.model.composition import PromptComposition, Prompts, check_shapes
from etr.table import config_to_dict

BY_PROMPT = [name for name, kind in COMPOSITIONS.items() if issubclass(kind, PromptComposition)]


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


def test_shapes_are_named() -> None:
    check_shapes({"a": torch.ones(2, 3)}, {"a": (2, None)})
    for shape in ((2,), (3, 3)):
        with pytest.raises(ValueError, match=r"'a' has shape \(2, 3\); it must be \("):
            check_shapes({"a": torch.ones(2, 3)}, {"a": shape})
