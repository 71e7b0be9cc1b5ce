"""What a layer is given: errors that name the field, and tokens that are not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import MoE, MoEConfig, RoutingContext
from etr.moe.context import RouterInput
from etr.moe.routers import ROUTERS, Router, TokenChoice
from etr.moe.routers.token_choice import LinearRouter
from etr.moe.routing import Scores
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
        ("block", IDS.float(), ValueError, "has dtype torch.float32; it must be integers"),
        ("block", IDS[0], ValueError, r"has shape \(3,\); it must be \(2, 3\)"),
        ("task", IDS.tolist(), TypeError, "is list; it must be a tensor of integers"),
        ("labels", MASK, ValueError, "has dtype torch.bool; it must be integers"),
        ("time", IDS, ValueError, "has dtype torch.int64; it must be floating numbers"),
        ("time", 0.5, TypeError, "is float; it must be a tensor of floating numbers"),
        ("serving", 3, TypeError, "is int; it must be the name of a serving policy"),
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


# What a policy or a router may ask of a call, and which of a token's choices run


class Sees(TokenChoice):
    """Keeps what its module was given."""

    name = "sees"

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return SeeingRouter(self, hidden_size, num_experts, top_k)


class SeeingRouter(LinearRouter):
    seen: RouterInput

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        self.seen = inputs
        return super().scores(x, inputs)


@pytest.mark.parametrize("name", ["block", "task", "labels"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_reach_the_router_as_int64(name: str, dtype: torch.dtype) -> None:
    layer = MoE(MoEConfig(**SIZES, router=Sees()))
    layer(X, RoutingContext(**{name: IDS.to(dtype)}))
    seen = layer.router.seen
    assert torch.equal(getattr(seen, name), torch.arange(6))
    rest = {"block", "task", "labels", "time"} - {name}
    assert all(getattr(seen, other) is None for other in rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_time_reaches_the_router_as_it_is(dtype: torch.dtype) -> None:
    layer = MoE(MoEConfig(**SIZES, router=Sees()))
    time = torch.linspace(0, 1, 6).view(2, 3).to(dtype)
    layer(X, RoutingContext(time=time))
    assert layer.router.seen.time.dtype == dtype
    assert torch.equal(layer.router.seen.time, time.flatten())


def chosen(layer: MoE, ranks: Any) -> list[list[int]]:
    """Experts of each token's used pairs, in order."""
    given = RoutingContext(token_ids=IDS.flatten(), ranks=ranks)
    routing, _ = layer.route(X.reshape(-1, 8), given)
    rows: list[list[int]] = [[] for _ in range(6)]
    for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        if expert < routing.num_experts:
            rows[token].append(expert)
    return rows


@pytest.mark.parametrize("ranks", [(0,), (1,), (2, 0), range(1, 3), [0, 1, 2]])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ROUTERS)
def test_ranks_are_places_among_a_tokens_choices(router: str, training: bool, ranks: Any) -> None:
    options = {"eval_selection": "dropless", "router": router}
    try:
        layer = MoE(MoEConfig(**SIZES, **options, top_k=3)).train(training)
    except ValueError:
        pytest.skip("defined for top_k=1")
    whole, found = chosen(layer, None), chosen(layer, ranks)
    if layer.traits.tokens_choose or not training:  # a token's choices are in order, best first
        took = [[row[rank] for rank in sorted(ranks) if rank < len(row)] for row in whole]
        assert found == took
        assert not layer.traits.fixed_k or all(len(row) == len(ranks) for row in found)
        return
    scores = layer.route(X.reshape(-1, 8), RoutingContext())[0].scores
    assert scores is not None
    for token, row in enumerate(found):
        best = sorted(range(4), key=lambda e: (-float(scores[token, e]), e))
        assert sorted(row) == sorted(best[rank] for rank in ranks)


def test_ranks_run_as_if_the_token_had_not_chosen_the_others() -> None:
    """With k choices the first is what top_k=1 chooses; all of them are what no ranks are."""
    options = {"router": "token_choice", "capacity": "none", "normalize": "none"}
    two, one = (MoE(MoEConfig(**SIZES, **options, top_k=k)).double() for k in (2, 1))
    one.load_state_dict(two.state_dict())
    x = X.double()
    first = two(x, RoutingContext(ranks=(0,)))
    assert torch.equal(first.hidden_states, one(x).hidden_states)
    assert int(first.stats["num_choices_per_expert"].sum()) == 6
    both = two(x, RoutingContext(ranks=(0, 1))).hidden_states
    assert torch.equal(both, two(x).hidden_states)
    second = two(x, RoutingContext(ranks=(1,))).hidden_states
    torch.testing.assert_close(first.hidden_states + second, both)


@pytest.mark.parametrize("ranks", [(), 0, (0, 0), (-1,), (0.0,), (True,), "01"])
def test_ranks_are_checked(ranks: Any) -> None:
    with pytest.raises(ValueError, match=r"context\.ranks=.* must be numbers of a token's choices"):
        MoE(MoEConfig(**SIZES))(X, RoutingContext(ranks=ranks))


def test_a_rank_that_no_choice_has_is_refused() -> None:
    layer = MoE(MoEConfig(**SIZES, router="token_choice", top_k=2))
    with pytest.raises(ValueError, match=r"ranks=\(0, 2\) must lie below 2"):
        layer(X, RoutingContext(ranks=(0, 2)))
    layer(X[:0], RoutingContext(ranks=(0, 2)))
