"""Capacity policies: each formula, its edges and its state."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import CAPACITIES, Collector, MoE, MoEConfig, RoutingContext, after_step, set_progress
from etr.moe.capacity import (
    AffinityMass,
    CapacityConfig,
    Factor,
    LocMoE,
    NoLimit,
    Schedule,
    Threshold,
    capacity_tokens,
)
from etr.moe.capacity.base import Ratio
from etr.moe.config import parse_capacity
from etr.moe.learner import Step
from etr.moe.routing import Limit, Routing
from etr.moe.table import config_to_dict

H, E = 16, 4


STEP = Step(counters={}, layers=(), affinity_p99=torch.zeros(()), number=torch.tensor(1))


def routing_of(num_tokens: int, top_k: int = 1, num_valid: int | None = None) -> Routing:
    layer = make(NoLimit(), top_k)
    mask = torch.arange(num_tokens) < (num_tokens if num_valid is None else num_valid)
    return layer.route(torch.randn(num_tokens, H), RoutingContext(valid_mask=mask))[0]


def make(capacity: CapacityConfig, top_k: int = 1, router: Any = "etr_paper") -> MoE:
    """Layers of equal routing: the published router has no parameters."""
    return MoE(
        MoEConfig(
            hidden_size=H,
            intermediate_size=4,
            num_experts=E,
            top_k=top_k,
            router=router,
            capacity=capacity,
        )
    )


def limit_of(
    config: CapacityConfig, routing: Routing, top_k: int = 1, affinity: float = 0.0
) -> Limit:
    policy = config.build(H, E, top_k)
    return policy.limit(routing, torch.zeros(E), torch.tensor(affinity))


@pytest.mark.parametrize(
    ("factor", "num_tokens", "top_k", "num_experts", "want"),
    [
        (1.0, 16, 1, 4, 4),
        (1.1, 100, 1, 10, 11),  # 1.1 * 10 is 11.000000000000002 in floating point
        (1.1, 1000, 1, 10, 110),
        (0.6, 15, 1, 3, 3),
        (0.6, 16, 1, 3, 4),
        (1.25, 10, 2, 4, 7),
        (0.7, 0, 2, 4, 0),
        (1.0, 7, 1, 2, 4),
        (1.1, 4096 * 1000, 2, 8, 1126400),
        (1.0000004, 10**8, 1, 10, 10000004),
        (1e-7, 10**9, 1, 10, 10),
        (0.1234567890123, 10**12, 1, 1, 123456789013),
    ],
)
def test_the_capacity_formula(
    factor: float, num_tokens: int, top_k: int, num_experts: int, want: int
) -> None:
    assert capacity_tokens(factor, num_tokens, top_k, num_experts) == want
    assert capacity_tokens(factor, torch.tensor(num_tokens), top_k, num_experts).item() == want
    assert Ratio.of(factor).tokens(num_tokens, top_k, num_experts) == want


@pytest.mark.parametrize("factor", [0.6, 1.1, 1.0000004, 1e-7, 3e-13, math.pi / 3, 12345.678901])
def test_the_fraction_of_a_factor(factor: float) -> None:
    """With the least denominator where that is small."""
    ratio = Ratio.of(factor)
    assert abs(Fraction(ratio.numerator, ratio.denominator) / Fraction(factor) - 1) <= 1e-12
    assert Ratio.of(0.6)[1:] == (3, 5)
    assert Ratio.of(1e-7)[1:] == (1, 10**7)


def test_thresholds_of_any_target_can_be_written_as_text() -> None:
    found = parse_capacity("threshold:factor,target.capacity_factor=0.6")
    assert found == Threshold(target=Factor(capacity_factor=0.6))
    assert parse_capacity("threshold:factor").target == Factor()
    assert CAPACITIES.from_dict(config_to_dict(found)) == found
    for text, words in (
        ("factor:0.6", "capacity option '0.6' in 'factor:0.6' must read option=value"),
        ("threshold:half", "target='half' is unknown; choose one of none, factor"),
        ("threshold:factor,target.rho=1", "'factor' has no option rho"),
        ("threshold:target.rho=1", "target=None is unknown"),
        ("threshold:locmoe", "must be a Factor"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_capacity(text)


def test_integer_and_tensor_capacity_agree() -> None:
    stages = [Schedule().factor(stage) for stage in range(16)]
    for factor in (0.2, 0.6, 1.0, 1.1, 1.25, math.pi / 3, *stages):
        for num_tokens in range(0, 400, 7):
            as_int = capacity_tokens(factor, num_tokens, 2, 8)
            assert capacity_tokens(factor, torch.tensor(num_tokens), 2, 8).item() == as_int
            assert as_int == math.ceil(factor * num_tokens * 2 / 8 - 1e-6)
            assert Ratio.of(factor).tokens(num_tokens, 2, 8) == as_int


@pytest.mark.parametrize("num_valid", [40, 29, 0])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.1, 10.0])
def test_factor_counts_valid_tokens_and_buffers_all(
    factor: float, top_k: int, num_valid: int
) -> None:
    limit = limit_of(Factor(capacity_factor=factor), routing_of(40, top_k, num_valid), top_k)
    want = max(1, math.ceil(factor * num_valid * top_k / E - 1e-6))
    size = min(40, math.ceil(factor * 40 * top_k / E - 1e-6))
    assert limit.capacity is not None
    assert limit.capacity.tolist() == [min(want, size)] * E
    assert limit.capacity.dtype == torch.int64
    assert limit.buffer_size == size
    assert limit.min_score is None


def test_none_has_no_limit() -> None:
    assert limit_of(NoLimit(), routing_of(10)) == Limit()


@pytest.mark.parametrize("least", [0, 1, 3, 100])
def test_min_capacity(least: int) -> None:
    limit = limit_of(Factor(capacity_factor=0.1, min_capacity=least), routing_of(20))
    assert limit.capacity is not None
    assert limit.capacity.tolist() == [min(20, max(least, 1))] * E
    assert limit.buffer_size == min(20, max(least, 1))


def test_schedule_moves_linearly_in_stages() -> None:
    config = Schedule()
    assert (config.start_factor, config.end_factor) == (1.1, 0.6)
    assert (config.start, config.end, config.num_stages) == (0.1, 0.7, 16)
    factors = [config.factor(config.stage(u / 1000)) for u in range(1001)]
    assert all(f == 1.1 for f in factors[:101])
    assert all(f == pytest.approx(0.6) for f in factors[700:])
    assert all(a >= b for a, b in itertools.pairwise(factors))
    assert len(set(factors)) == 16
    for u in range(100, 701):
        line = 1.1 - 0.5 * (u / 1000 - 0.1) / 0.6
        assert abs(factors[u] - line) <= 0.5 / 15 + 1e-9
    steps = sorted(set(factors))
    for a, b in itertools.pairwise(steps):
        assert b - a == pytest.approx(0.5 / 15)


@pytest.mark.parametrize("num_stages", [2, 3, 16])
@pytest.mark.parametrize(("start", "end"), [(0.1, 0.7), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_schedule_ends(num_stages: int, start: float, end: float) -> None:
    config = Schedule(num_stages=num_stages, start=start, end=end)
    assert config.stage(1.0) == num_stages - 1
    assert config.stage(0.0) == (num_stages - 1 if end == 0.0 else 0)
    assert config.factor(0) == 1.1
    assert config.factor(num_stages - 1) == pytest.approx(0.6)
    assert {config.stage(u / 500) for u in range(501)} <= set(range(num_stages))


def test_schedule_can_go_upwards() -> None:
    config = Schedule(start_factor=0.4, end_factor=1.1)
    assert config.factor(config.stage(0.0)) == 0.4
    assert config.factor(config.stage(1.0)) == pytest.approx(1.1)


def test_a_reloaded_schedule_stands_in_the_same_stage() -> None:
    """Progress is stored in float32; a stage must not flip on the way."""
    for step in range(1001):
        policy = Schedule().build(H, E, 1)
        policy.set_progress(step / 1000)
        other = Schedule().build(H, E, 1)
        other.load_state_dict(policy.state_dict())
        assert other.stage == policy.stage, step  # type: ignore[attr-defined]


def test_schedule_sets_the_limit() -> None:
    layer, routing = make(Schedule()), routing_of(40)
    for progress, factor in ((0.0, 1.1), (0.1, 1.1), (0.7, 0.6), (1.0, 0.6)):
        set_progress(layer, progress)
        limit = layer.capacity.limit(routing, torch.zeros(E), torch.zeros(()))
        want = math.ceil(factor * 40 / E - 1e-6)
        assert limit.capacity is not None
        assert limit.capacity.tolist() == [want] * E
        assert limit.buffer_size == want


def test_schedule_with_steps_needs_no_one_to_set_progress() -> None:
    policy = Schedule(steps=10, start=0.0, end=1.0, num_stages=11).build(H, E, 1)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(250):
            seen.append(policy.stage)  # type: ignore[attr-defined]
            policy.after_step(STEP)
    assert seen[0] == 0
    assert seen[10] == 10
    assert set(seen[10:]) == {10}
    assert seen[:11] == sorted(seen[:11])


def test_schedule_warns_once_when_nobody_sets_progress() -> None:
    policy = Schedule().build(H, E, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(99):
            policy.after_step(STEP)
        assert not caught
        for _ in range(300):
            policy.after_step(STEP)
    assert [w for w in caught if "set_progress" in str(w.message)] == caught
    assert len(caught) == 1


def test_affinity_mass_ragged_keeps_the_prefix() -> None:
    routing = routing_of(60, 2)
    limit = limit_of(AffinityMass(rho=0.5), routing, 2)
    assert limit.buffer_size is None
    assert limit.capacity is not None
    assert routing.probs is not None
    assert routing.scores is not None
    for e in range(E):
        queue = routing.token[routing.expert == e]
        queue = queue[routing.scores[queue, e].argsort(descending=True)]  # not that of the probs
        probs = routing.probs[queue, e].tolist()
        n = int(limit.capacity[e])
        assert sum(probs[:n]) >= 0.5 * sum(probs) * (1 - 1e-5)
        assert sum(probs[: n - 1]) < 0.5 * sum(probs)


def step_of(layer: MoE, *batches: Tensor) -> list[dict[str, Tensor]]:
    for x in batches:
        with Collector(layer):
            layer(x)
    return after_step(layer)


@pytest.mark.parametrize("num_tokens", [64, 700])
@pytest.mark.parametrize("top_k", [1, 2])
def test_affinity_mass_common_uses_the_mean_of_the_previous_step(
    num_tokens: int, top_k: int
) -> None:
    layer = make(AffinityMass(mode="common", rho=0.6), top_k)
    ragged = make(AffinityMass(rho=0.6), top_k)
    x = torch.randn(num_tokens, H)
    first = layer.keep(*layer.route(x, RoutingContext())).limit
    assert first == Limit()  # nothing dropped before anything is known
    prefix = ragged.keep(*ragged.route(x, RoutingContext())).limit.capacity
    assert prefix is not None
    step_of(layer, x)
    mean = float(prefix.float().mean())
    unit = max(8, math.ceil(num_tokens * top_k / (16 * E)))
    want = min(num_tokens, unit * math.ceil(math.ceil(mean - 1e-5) / unit))
    for other in (x, torch.randn(num_tokens, H)):  # static within a step
        limit = layer.keep(*layer.route(other, RoutingContext())).limit
        assert limit.capacity is not None
        assert limit.capacity.tolist() == [want] * E
        assert limit.buffer_size == want
    assert want >= mean


def test_affinity_mass_common_averages_micro_batches_and_survives_a_reload() -> None:
    layer = make(AffinityMass(mode="common"))
    batches = [torch.randn(200, H), torch.randn(100, H)]
    step_of(layer, *batches)
    ragged = make(AffinityMass())
    total = 0
    for x in batches:
        prefix = ragged.keep(*ragged.route(x, RoutingContext())).limit.capacity
        assert prefix is not None
        total += int(prefix.sum())
    assert float(layer.capacity.mass_factor) == pytest.approx(total / 300)
    other = make(AffinityMass(mode="common"))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(300, H)
    sizes = [m.keep(*m.route(x, RoutingContext())).limit.buffer_size for m in (layer, other)]
    assert sizes[0] == sizes[1] is not None


@pytest.mark.parametrize(
    "target", [Factor(capacity_factor=0.5), AffinityMass(rho=0.6), Schedule(start_factor=0.5)]
)
def test_threshold_imitates_its_target(target: Any) -> None:
    layer, plain = make(Threshold(target=target)), make(target)
    x = torch.randn(400, H)
    first, wanted = layer(x).stats, plain(x).stats
    assert torch.equal(first["num_tokens_per_expert"], wanted["num_tokens_per_expert"])
    for _ in range(5):
        step_of(layer, torch.randn(2000, H))
    found = layer.keep(*layer.route(torch.randn(8000, H), RoutingContext()))
    assert found.limit.capacity is None
    kept = found.selection.num_tokens_per_expert.sum() / 8000
    routing, limit = plain.route(torch.randn(8000, H), RoutingContext())
    want = plain.keep(routing, limit).selection.num_tokens_per_expert.sum() / 8000
    assert float(kept) == pytest.approx(float(want), abs=0.03)


def test_threshold_does_not_learn_from_its_own_drops() -> None:
    """Calibrating to what the thresholds kept would drift; the target's count is what counts."""
    layer = make(Threshold(target=Factor(capacity_factor=0.5)))
    shares = []
    for _ in range(60):
        found = step_of(layer, torch.randn(1000, H))[0]
        shares.append(float(found["num_tokens_per_expert"].sum()) / 1000)
    assert sum(shares[-20:]) / 20 == pytest.approx(0.5, abs=0.02)


def test_locmoe_freezes_the_first_steps_bound() -> None:
    layer = make(LocMoE(min_factor=0.01, max_factor=50.0), router="locmoe")
    x, y = torch.randn(500, H), torch.randn(300, H)
    before = layer.keep(*layer.route(x, RoutingContext())).limit
    assert before.capacity is not None
    assert before.capacity.tolist() == [500] * E  # the largest factor until the first step is done
    step_of(layer, x, y)
    p99 = layer.calibration.affinity_p99
    chosen = torch.cat([layer.route(v, RoutingContext())[0].score for v in (x, y)])  # type: ignore[misc]
    assert float(p99) == pytest.approx(float(chosen.quantile(0.99)), abs=0.02)
    z = math.sqrt(H * float(p99) ** 2 / (2 - float(p99) ** 2))
    bound = 1 / (E * math.erfc(z))
    assert float(layer.capacity.raw_bound) == pytest.approx(bound, rel=1e-5)
    factor = bound * E / 400  # tokens of one forward, on average
    assert float(layer.capacity.frozen_factor) == pytest.approx(max(factor, 0.01), rel=1e-5)
    frozen = copy.deepcopy(layer.capacity.state_dict())
    step_of(layer, 5 * x)
    for name, value in layer.capacity.state_dict().items():
        assert torch.equal(value, frozen[name])


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.1), (3.0, 4.0), (0.0001, 0.0002)])
def test_locmoe_clamps(low: float, high: float) -> None:
    layer = make(LocMoE(min_factor=low, max_factor=high), router="locmoe")
    step_of(layer, torch.randn(500, H))
    assert low * (1 - 1e-6) <= float(layer.capacity.frozen_factor) <= high * (1 + 1e-6)
    assert math.isfinite(float(layer.capacity.raw_bound))


def test_locmoe_waits_for_a_step_with_tokens() -> None:
    layer = make(LocMoE(), router="locmoe")
    with Collector(layer):
        layer(torch.randn(4, H), RoutingContext(valid_mask=torch.zeros(4, dtype=torch.bool)))
    after_step(layer)
    assert int(layer.capacity.num_updates) == 0


@pytest.mark.parametrize("affinity", [0.0, 0.1, 0.3, 0.45, 0.5, 0.6, 0.9, 1.0])
def test_the_floor_lies_between_min_capacity_and_the_mean_load(affinity: float) -> None:
    routing = routing_of(40)
    limit = limit_of(Factor(capacity_factor=0.2, floor="erfc"), routing, affinity=affinity)
    z = math.sqrt(H * affinity**2 / (2 - affinity**2))
    bound = 1 / (E * math.erfc(z)) if math.erfc(z) > 0 else math.inf
    floor = min(10, math.ceil(min(bound, 1e9)))
    assert limit.capacity is not None
    assert limit.capacity.tolist() == [max(2, floor)] * E
    assert limit.buffer_size is not None
    assert limit.buffer_size >= int(limit.capacity.max())


@pytest.mark.parametrize("name", list(CAPACITIES))
def test_policies_take_no_tokens(name: str) -> None:
    limit = limit_of(CAPACITIES[name](), routing_of(0))
    assert limit.buffer_size in (None, 0)
