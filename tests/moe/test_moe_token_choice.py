"""Options of the linear router: logit bias, selection bias, groups of experts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import Collector, MoE, MoEConfig, after_step
from etr.moe.context import RouterInput
from etr.moe.learner import Step
from etr.moe.routers import Router
from etr.moe.routers.token_choice import SelectionBias, TokenChoice
from etr.moe.routing import Routing
from etr.moe.stats import max_violation

T, H, E = 40, 16, 8


def build(top_k: int = 2, **options: Any) -> Any:
    router = TokenChoice(**options).build(H, E, top_k).double()
    if router.bias is not None:
        torch.nn.init.normal_(router.bias)
    if router.selection is not None:
        router.selection.bias.normal_()
    return router


def route(router: Router, x: Tensor, **inputs: Any) -> Routing:
    given = RouterInput(
        valid_mask=torch.ones(T, dtype=torch.bool),
        token_ids=None,
        token_index=torch.arange(T),
        step=torch.zeros(()),
        layer_index=0,
        **inputs,
    )
    return router(x, given)


def wanted(table: list[float], options: dict[str, Any], top_k: int) -> set[int]:
    """Choices of one token from their definition."""
    groups, kept = options.get("num_groups", 1), options.get("top_groups", 1)
    size = E // groups
    best = 2 if options.get("group_score") == "best_two" else 1
    value = [sum(sorted(table[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
    allowed = sorted(range(groups), key=lambda g: -value[g])[:kept]
    experts = [e for g in allowed for e in range(g * size, (g + 1) * size)]
    return set(sorted(experts, key=lambda e: -table[e])[:top_k])


RATE = 0.1


@pytest.mark.parametrize(
    ("update", "want"),
    [
        ("none", [0.0, 0.0, 0.0, 0.0]),
        ("sign", [-0.1, 0.1, 0.0, 0.1]),
        ("proportional", [-0.3, 0.1, 0.0, 0.2]),
        ("decaying", [-0.15, 0.05, 0.0, 0.1]),
    ],
)
def test_the_selection_bias_moves_towards_an_even_load(update: str, want: list[float]) -> None:
    """Loads 5, 1, 2 and 0 with a mean of 2, in the fourth step."""
    config = TokenChoice(selection_bias=True, bias_update=update, bias_rate=RATE)  # type: ignore
    selection = config.build(H, 4, 1).selection
    assert isinstance(selection, SelectionBias)
    counters = {"num_choices_per_expert": torch.tensor([5, 1, 2, 0])}
    step = Step(
        counters=counters, layers=[counters], affinity_p99=torch.zeros(()), number=torch.tensor(4)
    )
    selection.after_step(step)
    torch.testing.assert_close(selection.bias, torch.tensor(want))
    assert selection.moves == (update != "none")


@pytest.mark.parametrize(
    ("update", "rate", "steps"),
    [("sign", 1e-3, 600), ("proportional", 2e-5, 300), ("decaying", 1e-4, 300)],
)
def test_a_moving_bias_evens_out_skewed_loads(update: str, rate: float, steps: int) -> None:
    """MaxVio falls from above 2 to below 0.25, while no weight changes."""
    torch.manual_seed(0)
    router = TokenChoice(bias_update=update, bias_rate=rate)  # type: ignore[arg-type]
    sizes = {"hidden_size": H, "intermediate_size": 4, "num_experts": E, "top_k": 2}
    layer = MoE(MoEConfig(**sizes, router=router, capacity="none"))  # type: ignore[arg-type]
    skew = torch.nn.functional.normalize(layer.router.weight[:2].sum(0).detach(), dim=0)
    found = []
    for _ in range(steps):
        with Collector(layer):
            output = layer(torch.randn(1024, H) + 4 * skew)
        found.append(float(max_violation(output.stats["num_choices_per_expert"])))
        after_step(layer)
    assert found[0] > 2
    assert sum(found[-10:]) / 10 < 0.25, found[::10]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_makes_no_step_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"bias_rate={rate} must be > 0 and finite"):
        TokenChoice(bias_update="sign", bias_rate=rate)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"selection_bias": True},
    {"num_groups": 4, "top_groups": 2},
    {"num_groups": 4, "top_groups": 2, "group_score": "best_two"},
    {"num_groups": 2, "top_groups": 1, "group_score": "best_two", "selection_bias": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_choices_and_weights_follow_their_definition(
    top_k: int, gate: str, options: dict[str, Any]
) -> None:
    router = build(top_k, gate=gate, **options)
    x = torch.randn(T, H, dtype=torch.float64)
    logits = x @ router.weight.T + (0 if router.bias is None else router.bias)
    gates = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
    table = gates + (0 if router.selection is None else router.selection.bias)
    routing = route(router, x)
    for t in range(T):
        chosen = routing.expert[routing.token == t].tolist()
        assert set(chosen) == wanted(table[t].tolist(), options, top_k)
    # Weights are the gates without the selection bias, and so is what experts rank by.
    expected = gates[routing.token, routing.expert]
    torch.testing.assert_close(routing.gate, expected)
    torch.testing.assert_close(routing.score, expected.detach())


def test_groups_and_bias_also_decide_where_experts_would_choose() -> None:
    """Evaluation without thresholds asks every router for token choice."""
    router = build(gate="sigmoid", num_groups=4, top_groups=1, selection_bias=True)
    x = torch.randn(T, H, dtype=torch.float64)
    given = RouterInput(
        valid_mask=torch.ones(T, dtype=torch.bool),
        token_ids=None,
        token_index=torch.arange(T),
        step=torch.zeros(()),
        layer_index=0,
    )
    assert torch.equal(router(x, given, tokens_choose=True).expert, router(x, given).expert)


def test_a_bonus_shifts_choices_on_top_of_the_selection_bias() -> None:
    router = build(1, selection_bias=True)
    x = torch.randn(T, H, dtype=torch.float64)
    bonus = torch.zeros(E, dtype=torch.float64)
    bonus[3] = 100
    assert set(route(router, x, bonus=bonus).expert.tolist()) == {3}


def test_the_selection_bias_is_float32_state_without_gradient() -> None:
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=8,
        num_experts=E,
        top_k=2,
        router=TokenChoice(gate="sigmoid", selection_bias=True),
        capacity="none",
    )
    layer = MoE(config).bfloat16()
    assert layer.router.selection.bias.dtype == torch.float32
    assert "router.selection.bias" in layer.state_dict()
    assert "router.selection.bias" not in dict(layer.named_parameters())
    assert MoEConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, "num_groups=3 must divide num_experts=8"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups=5 must lie between 1 and num_groups=4"),
        ({"num_groups": 8, "top_groups": 2}, "top_groups=2 groups of 1 experts hold fewer.*3"),
        (
            {"num_groups": 8, "top_groups": 4, "group_score": "best_two"},
            "group_score='best_two' needs two experts a group",
        ),
        ({"group_score": "mean"}, "group_score='mean' must be one of best, best_two"),
        ({"gate": "relu"}, "gate='relu' must be one of softmax, sigmoid"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenChoice(**options).build(H, E, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_gate": True}, "shared_gate=True needs num_shared_experts"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size=0 must be at least 1"),
        ({"routed_scale": 0.0}, r"routed_scale=0.0 must be > 0"),
        ({"swiglu_limit": -1.0}, r"swiglu_limit=-1.0 must be > 0"),
    ],
)
def test_impossible_options_of_the_layer_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(hidden_size=H, intermediate_size=8, num_experts=E, **options)
