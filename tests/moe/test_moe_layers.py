"""Finding the layers of a model, and choosing how they select while it is evaluated."""

from __future__ import annotations

import pytest
import torch

import etr
from etr.moe import MoE, MoEConfig, selecting

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
