"""EC-DLM: equal loads in every block, and how many experts for how many masks."""

from __future__ import annotations

import pytest
import torch
from decisions import layer_of
from torch import Tensor

from etr.methods.ec_dlm import SCHEDULES, experts_per_token
from etr.moe import MoE, RoutingContext
from etr.moe.routers import ROUTERS


def layer(num_experts: int = 8, top_k: int = 2, router: str = "ec_dlm") -> MoE:
    options = {"num_experts": num_experts, "top_k": top_k, "router": router, "capacity": "none"}
    return layer_of("token_choice", **options, eval_selection="batch").double().eval()


def taken(one: MoE, x: Tensor, **context: Tensor) -> Tensor:
    """Which expert took which token, bool [T, E]."""
    routing, _ = one.route(x, RoutingContext(**context))
    return routing.routing_map()


@pytest.mark.criterion
def test_loads_are_equal_and_follow_the_schedule() -> None:
    """In every block each expert takes max(1, floor(S k(r) / E)) tokens; k(0), k(1/4), k(1/2), k(1)
    between 8 and 32 are 32, 26, 20, 8 (linear_reverse), 32, 28, 20, 8 (cosine_reverse) and 8, 20,
    32, 8 (gauss), with means of 20.00, 20.00 and 20.02 over r."""
    r = torch.tensor([0, 0.25, 0.5, 1], dtype=torch.float64)
    every = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for name, wanted, mean in (
        ("linear_reverse", [32, 26, 20, 8], 20.00),
        ("cosine_reverse", [32, 28, 20, 8], 20.00),
        ("gauss", [8, 20, 32, 8], 20.02),
    ):
        assert experts_per_token(r, 8, 32, name).tolist() == wanted
        assert round(float(experts_per_token(every, 8, 32, name).double().mean()), 2) == mean
    one = layer(router="ec_dlm:k_min=1,k_max=5")
    block = torch.tensor([4] * 16 + [9] * 24 + [2] * 3)
    time = torch.tensor([0.0] * 16 + [0.5] * 12 + [1.0] * 12 + [1.0] * 3)
    found = taken(one, torch.randn(43, 16).double(), block=block, time=time)
    for number, load in ((4, 10), (9, 6), (2, 1)):  # k = 5, 2 and 1
        assert found[block == number].sum(0).tolist() == [load] * 8


def test_both_ends_of_every_schedule_are_exact() -> None:
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for name in SCHEDULES:
        found = experts_per_token(ends, 3, 11, name).tolist()
        assert sorted(found) in ([3, 3], [3, 11], [11, 11])
        assert experts_per_token(torch.rand(9).double(), 4, 4, name).tolist() == [4] * 9


@pytest.mark.parametrize(("tokens", "experts", "k", "each"), [(60, 16, 2, 7), (12, 16, 1, 1)])
def test_the_floor_and_the_one(tokens: int, experts: int, k: int, each: int) -> None:
    """Experts a token really has: 1.867 for k = 2, 1.333 for k = 1."""
    found = taken(layer(experts, k), torch.randn(tokens, 16).double())
    assert found.sum(0).tolist() == [each] * experts
    assert round(float(found.sum() / tokens), 3) == {2: 1.867, 1: 1.333}[k]


def test_worked_example() -> None:
    """Expert 0 takes tokens 0 and 1, expert 1 tokens 2 and 3; each then has weight 1."""
    one = layer(2, 1)
    with torch.no_grad():
        one.router.weight.copy_(torch.eye(2, 16))
    probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]], dtype=torch.float64)
    x = torch.nn.functional.pad(probs.log(), (0, 14))
    routing, limit = one.route(x, RoutingContext())
    assert routing.routing_map().int().tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    weight = one.keep(routing, limit).selection.combine_weight
    assert weight[routing.valid].tolist() == [1.0] * 4


def test_weights_are_a_softmax_over_the_experts_that_took_the_token() -> None:
    one, x = layer(), torch.randn(24, 16).double()
    routing, limit = one.route(x, RoutingContext())
    weight = one.keep(routing, limit).selection.combine_weight.detach().view(24, 8)
    found = torch.zeros(24, 9).double().scatter(1, routing.expert.view(24, 8), weight)[:, :8]
    masked = routing.logits.masked_fill(~routing.routing_map(), -torch.inf)
    torch.testing.assert_close(found, masked.softmax(-1).nan_to_num(0))


def test_blocks_and_padding_do_not_touch_each_other() -> None:
    one, x = layer(), torch.randn(20, 16).double()
    block, time = torch.tensor([1, 0] * 10), torch.tensor([0.25, 0.75] * 10)
    valid = torch.arange(20) < 18
    found = taken(one, x, block=block, time=time, valid_mask=valid)
    assert not found[18:].any()
    for first in (0, 1):
        rows = slice(first, 18, 2)
        alone = taken(one, x[rows], time=time[rows])
        assert torch.equal(found[rows], alone)
    nobody = taken(one, x, valid_mask=torch.zeros(20, dtype=torch.bool))
    assert not nobody.any()


def test_equal_bounds_are_static_expert_choice() -> None:
    """And so is a call that names no time, with k = top_k."""
    x, time = torch.randn(16, 16).double(), torch.rand(16)
    static = layer(router="ec_dlm:k_min=2,k_max=2")
    other = layer()
    other.load_state_dict(static.state_dict())
    found = taken(static, x, time=time)
    assert torch.equal(found, taken(other, x))
    logits = static.route(x, RoutingContext())[0].logits
    best = logits.topk(4, dim=0).indices
    assert torch.equal(found, torch.zeros(16, 8, dtype=torch.bool).scatter(0, best, True))


@pytest.mark.parametrize(
    ("option", "name"),
    [("schedule=up", "schedule"), ("k_min=9", "k_min=9"), ("k_max=0", "k_max=0")],
)
def test_options_are_checked(option: str, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ROUTERS.parse(f"ec_dlm:{option}").check(16, 8, 2)
