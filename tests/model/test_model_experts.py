"""What transforms of experts share: made together, held no longer than needed, who stays."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from etr.methods.easy_ep import EasyEp
from etr.model import LazyTensor
from etr.model.experts import OfExperts, best, check_numbers, lists_of, rebuilt, taken
from etr.moe import MoEConfig

LAYERS = [
    MoEConfig(hidden_size=4, intermediate_size=2, num_experts=3, router="token_choice"),
    MoEConfig(hidden_size=4, intermediate_size=2, num_experts=2, router="token_choice"),
]


def lazy(calls: list[str], **shapes: tuple[int, ...]) -> dict[str, LazyTensor]:
    """Tensors of ones that note when they are made."""

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        calls.append(name)
        return torch.ones(shape)

    names = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {
        name: LazyTensor(
            name=name, shape=shape, dtype=torch.float32, make=lambda n=name, s=shape: make(n, s)
        )
        for name, shape in names.items()
    }


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_tensors_made_together_are_made_once_and_let_go(order: tuple[int, int]) -> None:
    calls: list[str] = []
    seen: list[weakref.ref] = []
    old = lazy(
        calls, experts__up_proj=(3, 2, 4), experts__down_proj=(3, 4, 2), router__weight=(3, 4)
    )

    def change(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {name: value[:2] * 2 for name, value in values.items()}
        seen.extend(weakref.ref(value) for value in (*values.values(), *made.values()))
        return made

    new = rebuilt(old, change)
    seen.clear()  # those of the meta device
    assert calls == []
    assert new["router.weight"] is old["router.weight"]
    names = [name for name in new if name.startswith("experts.")]
    assert [new[name].shape for name in names] == [(2, 2, 4), (2, 4, 2)]
    for place in order:
        value = new[names[place]].make()
        assert value.shape == new[names[place]].shape
        assert float(value.sum()) == 2 * value.numel()
        del value
    assert sorted(calls) == ["experts.down_proj", "experts.up_proj"]
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_some_experts_any_number_of_times() -> None:
    old = {
        name: tensor.then(lambda value: torch.arange(3.0).view(3, 1) * value.flatten(1))
        for name, tensor in lazy([], router__weight=(3, 4), router__bias=(3, 1)).items()
    }
    new = taken({**old, **lazy([], router__scale=(1,))}, [2, 0, 2, 1], 3, but=["router.bias"])
    assert new["router.weight"].make()[:, 0].tolist() == [2, 0, 2, 1]
    assert new["router.weight"].shape == (4, 4)
    assert new["router.bias"] is old["router.bias"]
    assert new["router.scale"].shape == (1,)


def test_the_best_are_the_first_of_equals() -> None:
    assert best(torch.tensor([[1.0, 2], [2, 2]]), 2).tolist() == [[False, True], [True, False]]
    assert not best(torch.ones(3), 0).any()


def test_protected_experts_by_layer() -> None:
    assert OfExperts(protect="0.2+1.0+0.1").protected(LAYERS) == [{1, 2}, {0}]
    assert OfExperts().protected(LAYERS) == [set(), set()]
    with pytest.raises(ValueError, match=r"protect='1\.2' names expert 2 of layer 1; there are 2"):
        OfExperts(protect="1.2").protected(LAYERS)
    with pytest.raises(ValueError, match="must be experts as layer"):
        OfExperts(protect="1,2")


def test_unseen_experts_are_judged_by_the_rule() -> None:
    tokens = [torch.tensor([5, 0, 3]), torch.tensor([1, 2])]
    scores = [torch.tensor([1.0, 2, 3]), torch.tensor([[4.0, 5], [6, 7]])]
    inf = float("inf")
    kept = EasyEp(min_tokens=2).judged(tokens, scores, LAYERS)
    assert [score.tolist() for score in kept] == [[1, inf, 3], [[inf, inf], [6, 7]]]
    gone = EasyEp(min_tokens=2, unseen="drop", protect="1.1").judged(tokens, scores, LAYERS)
    assert [score.tolist() for score in gone] == [[1, -inf, 3], [[-inf, -inf], [inf, inf]]]
    with pytest.raises(ValueError, match=r"experts \[1\] of layer 0 kept fewer than min_tokens=1"):
        EasyEp(unseen="refuse").judged(tokens, scores, LAYERS)
    assert scores[0].tolist() == [1, 2, 3]
    for options in ({"min_tokens": -1}, {"unseen": "guess"}):
        with pytest.raises(ValueError, match="must be"):
            EasyEp(**options)


@pytest.mark.parametrize("found", [[0, 3], [1, 1], [-1], [0.0], [True], "01", None])
def test_numbers_of_a_plan(found: object) -> None:
    check_numbers([2, 0], 3, "things")
    with pytest.raises(ValueError, match="the plan's things must be different numbers below 3"):
        check_numbers(found, 3, "things")


def test_lists_of_a_plan() -> None:
    assert lists_of({"a": [1, 2]}, "a", LAYERS) == [1, 2]
    for plan in ({}, [], {"a": 1}, {"a": [1]}):
        with pytest.raises(ValueError, match="the model has 2 MoE layers"):
            lists_of(plan, "a", LAYERS)
