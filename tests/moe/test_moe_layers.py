"""Finding the layers of a model, and choosing how they select while it is evaluated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import etr
from etr.moe import MoE, MoEConfig, selecting
from etr.moe.layers import tie_experts

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4}


def model_of() -> torch.nn.ModuleList:
    """In training; the first layer selects dropless, and the last is frozen in eval mode."""
    model = torch.nn.ModuleList(
        MoE(MoEConfig(**SIZES, eval_selection=how), i)  # type: ignore[arg-type]
        for i, how in enumerate(("dropless", "threshold", "threshold"))
    )
    model[-1].eval()
    return model


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_selecting_puts_back_every_layers_selection_and_every_modules_mode(
    training: bool, fails: bool
) -> None:
    model = model_of()
    if not training:
        model.eval()
    modes = [module.training for module in model.modules()]
    try:
        with selecting(model, "batch"):
            assert [layer.eval_selection for layer in etr.moe_layers(model)] == ["batch"] * 3
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [layer.eval_selection for layer in etr.moe_layers(model)] == [
        "dropless",
        "threshold",
        "threshold",
    ]
    assert [module.training for module in model.modules()] == modes


def test_selecting_refuses_an_unknown_selection_and_changes_nothing() -> None:
    model = model_of()
    refused = pytest.raises(ValueError, match="selection='best' is unknown; choose one of")
    with refused, selecting(model, "best"):  # type: ignore[arg-type]
        pass
    assert model.training


def test_selecting_takes_a_model_without_layers() -> None:
    model = torch.nn.Linear(2, 2)
    with selecting(model, "threshold"):
        assert not model.training
    assert model.training


def test_the_layers_of_a_model_are_found_in_order_itself_included() -> None:
    model = model_of()
    assert etr.moe_layers(model) == list(model)
    assert etr.moe_layers(model[0]) == [model[0]]


def pair(*changes: dict[str, Any]) -> list[MoE]:
    """Layers that differ in what is named."""
    options = {**SIZES, "router": "token_choice", "experts": "shared"}
    return [MoE(MoEConfig(**{**options, **change}), i) for i, change in enumerate(changes)]


def test_layers_of_one_bank_hold_one_module() -> None:
    """Whatever else they differ in."""
    layers = pair({}, {"capacity": "none", "top_k": 2}, {})
    tie_experts(layers)
    assert layers[0].experts is layers[1].experts is layers[2].experts
    apart = pair({"experts": "uniform"}, {"experts": "uniform"})
    tie_experts(apart)
    assert apart[0].experts is not apart[1].experts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 2}, "num_experts: 2, 4"),
        ({"intermediate_size": 4}, "intermediate_size: 4, 8"),
        ({"activation": "gelu"}, "activation: 'gelu', 'swiglu'"),
        ({"experts": "shared:nulls"}, "bank_config: Shared"),
    ],
)
def test_layers_of_other_experts_cannot_share_a_bank(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"MoE layers 1 and 0 share a bank and differ in {words}"):
        tie_experts(pair({}, change))
    with pytest.raises(ValueError, match="layers 1 and 0 share a bank and differ in bank_config"):
        tie_experts(pair({"experts": "uniform"}, {}))
