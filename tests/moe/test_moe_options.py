"""LayerOptions: one list of options, wherever a layer's choices are made."""

from __future__ import annotations

import dataclasses
import importlib

import pytest

from etr.moe import MoEConfig
from etr.moe.config import SIZES
from etr.moe.options import OPTIONS, LayerOptions


def test_a_config_is_its_sizes_and_the_options() -> None:
    assert {field.name for field in dataclasses.fields(MoEConfig)} == {*SIZES, *OPTIONS}
    sizes = dict(zip(SIZES, (16, 8, 4, 2), strict=True))
    options = LayerOptions(router="token_choice:gate=sigmoid", capacity="factor", rank_by="score")
    config = MoEConfig(**sizes, **options.options())
    assert config.to_dict() == {**options.to_dict(), **sizes}
    assert LayerOptions.from_dict(options.to_dict()).to_dict() == options.to_dict()


def test_options_are_checked_without_sizes() -> None:
    with pytest.raises(ValueError, match="capacity 'threshold' keeps the best choosers"):
        LayerOptions(router="baseline", capacity="threshold", rank_by="position")
    with pytest.raises(ValueError, match="router 'etr' has no option frames; it has frame"):
        LayerOptions(router="etr:frames=fixed")
    with pytest.raises(ValueError, match="LayerOptions has no field hidden_size"):
        LayerOptions.from_dict({"hidden_size": 4})


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("config", "MoEConfig parse_router parse_capacity EVAL_SELECTIONS support_table"),
        ("config", "unsupported resolve_rank_by config_to_dict"),
        ("losses", "LossConfig AuxMode balance_loss z_loss locality_loss locality_target"),
        ("losses", "scaled_losses sum_over_group"),
    ],
)
def test_names_are_importable_from_where_they_were(module: str, names: str) -> None:
    found = importlib.import_module(f"etr.moe.{module}")
    assert all(hasattr(found, name) for name in names.split())
