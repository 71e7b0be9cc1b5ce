"""Configs refuse values of another type, whichever field they are given for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import etr
from etr.moe import CAPACITIES, ROUTERS, LossConfig
from etr.moe.dispatch import DISPATCHERS

CONFIGS = [*ROUTERS.values(), *CAPACITIES.values(), *DISPATCHERS.values(), LossConfig]
FIELDS = [(kind, field) for kind in CONFIGS for field in dataclasses.fields(kind)]
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4}


class Alien:
    """Of no type that any field takes."""

    def __repr__(self) -> str:
        return "alien"


@pytest.mark.parametrize(
    ("kind", "field"), FIELDS, ids=[f"{kind.__name__}-{field.name}" for kind, field in FIELDS]
)
def test_a_field_of_a_part(kind: Any, field: dataclasses.Field[Any]) -> None:
    with pytest.raises(ValueError, match=f"^{field.name}=alien must be "):
        kind(**{field.name: Alien()})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(etr.MoEConfig)])
def test_a_field_of_the_layer(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=alien must be "):
        etr.MoEConfig(**{**SIZES, name: Alien()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size='64' must be an integer"),
        ({"hidden_size": 64.0}, "hidden_size=64.0 must be an integer"),
        ({"top_k": True}, "top_k=True must be an integer"),
        ({"capacity": [1]}, r"capacity=\[1\] must be a string, or a CapacityConfig, or None"),
        ({"capacity": 1.25}, "capacity factor is capacity='factor:capacity_factor=1.25'"),
        ({"routed_scale": "1"}, "routed_scale='1' must be a number"),
        ({"debug": 1}, "debug=1 must be True or False"),
        ({"rank_by": "length"}, "rank_by='length' must be one of score, position, or None"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        etr.MoEConfig(**{**SIZES, **options})


def test_an_integer_is_a_number() -> None:
    assert etr.MoEConfig(**SIZES, routed_scale=2).routed_scale == 2
