"""What a layer is given: errors that name the field, and tokens that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from etr.moe import MoE, MoEConfig, RoutingContext
from etr.moe.routers import ROUTERS
from etr.moe.stats import add_stats

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_experts": 4}
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True, True, False], [True, True, True]])
IDS = torch.arange(6).view(2, 3)


@pytest.mark.parametrize("given", [MASK, MASK.long(), {"valid_mask": MASK}, "mask", 0, False])
def test_a_bare_mask_is_told_where_it_belongs(given: Any) -> None:
    with pytest.raises(TypeError, match=r"context is \w+; .*RoutingContext\(valid_mask=mask\)"):
        MoE(MoEConfig(**SIZES))(X, given)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("valid_mask", MASK.long(), ValueError, "has dtype torch.int64; it must be bool, True ="),
        ("valid_mask", MASK.float(), ValueError, "has dtype torch.float32; it must be bool"),
        ("valid_mask", MASK.tolist(), TypeError, "is list; it must be a tensor of bool"),
        ("valid_mask", MASK[0], ValueError, r"has shape \(3,\); it must be \(2, 3\)"),
        ("token_ids", IDS.float(), ValueError, "has dtype torch.float32; it must be integers"),
        ("token_ids", IDS.tolist(), TypeError, "is list; it must be a tensor of integers"),
        ("token_ids", MASK, ValueError, "has dtype torch.bool; it must be integers"),
        ("replay", IDS, TypeError, "is Tensor; it must be a dictionary from the index"),
    ],
)
def test_fields_of_the_context_are_checked(
    name: str, value: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=f"context.{name} {words}"):
        MoE(MoEConfig(**SIZES))(X, RoutingContext(**{name: value}))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (None, TypeError, "is NoneType; it must be a floating tensor"),
        ([[1.0] * 8], TypeError, "is list; it must be a floating tensor"),
        (X.long(), ValueError, "has dtype torch.int64; it must be floating"),
        (X.to(torch.complex64), ValueError, "has dtype torch.complex64; it must be floating"),
        (
            torch.tensor(1.0),
            ValueError,
            r"has shape \(\); its last dimension must be hidden_size=8",
        ),
        (X[..., :7], ValueError, r"has shape \(2, 3, 7\); its last .* hidden_size=8"),
    ],
)
def test_hidden_states_are_checked(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"hidden_states {words}"):
        MoE(MoEConfig(**SIZES))(value)


@pytest.mark.parametrize("config", [SIZES, 8])
def test_a_layer_is_made_of_a_config(config: Any) -> None:
    with pytest.raises(TypeError, match=r"config is \w+; it must be a MoEConfig"):
        MoE(config)


@pytest.mark.parametrize("value", [1.25, 1, True])
def test_a_number_is_no_capacity_but_a_factor_is(value: Any) -> None:
    with pytest.raises(ValueError, match=f"capacity={value} must be .* of a policy") as error:
        MoEConfig(**SIZES, capacity=value)
    if value == 1.25:
        (advice,) = [part for part in str(error.value).split("'") if part.startswith("factor")]
        assert MoEConfig(**SIZES, capacity=advice).capacity_config.capacity_factor == 1.25


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_tokens_that_are_not_finite_are_counted(router: str, value: float, training: bool) -> None:
    layer = MoE(MoEConfig(**SIZES, router=router)).train(training)
    x = X.clone()
    x[0, 1, 3] = x[1, 0, :] = x[0, 2, 0] = value  # the last one is padding
    context = RoutingContext(valid_mask=MASK, token_ids=IDS)
    reads_tokens = router not in ("hash", "random")
    found = [layer(given, context).stats for given in (x, X)]
    counts = [stats["num_nonfinite_tokens"] for stats in (*found, add_stats(*found))]
    assert [int(count) for count in counts] == ([2, 0, 2] if reads_tokens else [0, 0, 0])
    assert counts[0].dtype == torch.int64


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_debug_leaves_padding_alone(value: float) -> None:
    layer = MoE(MoEConfig(**SIZES, debug=True), layer_index=3)
    x = X.clone()
    x[0, 2] = value
    context = RoutingContext(valid_mask=MASK)
    assert layer(x, context).hidden_states.isfinite().all()
    x[1, 1] = value
    with pytest.raises(ValueError, match="MoE layer 3 holds NaN or infinite values in 1 of 6 tok"):
        layer(x, context)
