"""What holds for every selection, on small cases that hypothesis looks for."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from etr.moe.capacity import capacity_tokens
from etr.moe.routing import Limit, Routing, Selection
from etr.moe.select import mass_prefix, select, token_pairs, top_experts

settings.register_profile("etr", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("etr")

COARSE = st.sampled_from([-0.5, 0.0, 0.25, 0.25000003, 0.5, 1.0])  # ties and near ties


@st.composite
def routings(draw: st.DrawFn, max_experts: int = 4) -> Routing:
    """Token choice among coarse scores, with padding anywhere."""
    num_experts = draw(st.integers(1, max_experts))
    num_tokens = draw(st.integers(0, 8))
    top_k = draw(st.integers(1, num_experts))
    row = st.lists(COARSE, min_size=num_experts, max_size=num_experts)
    scores = torch.tensor(draw(st.lists(row, min_size=num_tokens, max_size=num_tokens)))
    scores = scores.reshape(num_tokens, num_experts)
    valid = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    mask = torch.tensor(valid, dtype=torch.bool)
    token, expert = token_pairs(top_experts(scores, top_k), mask, num_experts)
    index = expert.clamp_max(num_experts - 1)
    probs = (3 * scores).softmax(-1)
    return Routing(
        token=token,
        expert=expert,
        score=scores[token, index],
        gate=probs[token, index],
        valid_mask=mask,
        scores=scores,
        logits=None,
        probs=probs,
        num_experts=num_experts,
        top_k=top_k,
    )


def capacities(routing: Routing) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 9), min_size=routing.num_experts, max_size=routing.num_experts)


def run(routing: Routing, capacity: list[int] | Tensor, **options: Any) -> Selection:
    options.setdefault("rank_by", "score")
    return select(routing, Limit(capacity=torch.as_tensor(capacity)), **options)


def queue(routing: Routing, expert: int) -> list[int]:
    assert routing.score is not None
    pairs = [p for p, e in enumerate(routing.expert.tolist()) if e == expert]
    return sorted(pairs, key=lambda p: (-float(routing.score[p]), p))  # type: ignore[index]


@given(st.data(), st.sampled_from(["score", "position"]))
def test_each_expert_keeps_its_best_up_to_capacity(data: st.DataObject, rank_by: str) -> None:
    routing = data.draw(routings())
    capacity = data.draw(capacities(routing))
    selection = run(routing, capacity, rank_by=rank_by)
    for e in range(routing.num_experts):
        order = queue(routing, e)
        if rank_by == "position":
            order.sort()
        found = [p for p in order if bool(selection.kept[p])]
        assert found == order[: capacity[e]]
        assert int(selection.num_tokens_per_expert[e]) == len(found)
        start = int(selection.bounds[e])
        assert selection.order[start : start + len(found)].tolist() == found
    assert not bool(selection.kept[~routing.valid].any())


@given(st.data(), st.sampled_from(["choosers", "all"]))
def test_more_capacity_keeps_a_superset(data: st.DataObject, pool: str) -> None:
    routing = data.draw(routings())
    less = data.draw(capacities(routing))
    more = [c + data.draw(st.integers(0, 3)) for c in less]
    small, large = (run(routing, c, expert_pool=pool).kept for c in (less, more))
    assert not bool((small & ~large).any())


@given(st.data())
def test_the_pool_of_all_tokens_keeps_a_subset(data: st.DataObject) -> None:
    routing = data.draw(routings())
    capacity = data.draw(capacities(routing))
    fewer, more = (run(routing, capacity, expert_pool=pool).kept for pool in ("all", "choosers"))
    assert not bool((fewer & ~more).any())


@given(st.data())
def test_enough_capacity_drops_nothing(data: st.DataObject) -> None:
    routing = data.draw(routings())
    plenty = [routing.num_tokens] * routing.num_experts
    assert torch.equal(run(routing, plenty).kept, routing.valid)


@given(st.data())
def test_a_lower_threshold_keeps_a_superset(data: st.DataObject) -> None:
    routing = data.draw(routings())
    level = st.lists(COARSE, min_size=routing.num_experts, max_size=routing.num_experts)
    high = torch.tensor(data.draw(level))
    low = high - 0.25
    kept = [select(routing, Limit(min_score=bound), rank_by="score").kept for bound in (high, low)]
    assert not bool((kept[0] & ~kept[1]).any())


@given(st.data())
def test_a_threshold_at_the_last_kept_score_keeps_the_same(data: st.DataObject) -> None:
    """Where scores are distinct; ties at the boundary are all kept."""
    routing = data.draw(routings())
    assert routing.score is not None
    capacity = data.draw(capacities(routing))
    kept = run(routing, capacity).kept
    bound = torch.full((routing.num_experts,), torch.inf)
    for e in range(routing.num_experts):
        scores = routing.score[kept & (routing.expert == e)]
        if len(scores):
            bound[e] = scores.min()
    again = select(routing, Limit(min_score=bound), rank_by="score").kept
    assert not bool((kept & ~again).any())
    for p in (again & ~kept).nonzero().flatten().tolist():
        assert float(routing.score[p]) == float(bound[int(routing.expert[p])])


@given(st.data(), st.floats(0.01, 1.0))
def test_the_mass_prefix_is_minimal_and_monotone(data: st.DataObject, rho: float) -> None:
    routing = data.draw(routings())
    assert routing.probs is not None
    found = mass_prefix(routing, rho)
    for e in range(routing.num_experts):
        probs = [float(routing.probs[routing.token[p], e]) for p in queue(routing, e)]
        n, goal = int(found[e]), (rho - 1e-6) * sum(probs)
        assert sum(probs[:n]) >= goal - 1e-9
        assert n == 0 or sum(probs[: n - 1]) < goal + 1e-9
        assert n <= len(probs)
    assert bool((mass_prefix(routing, max(0.005, rho / 2)) <= found).all())


@given(st.data(), st.sampled_from(["none", "chosen", "kept"]))
def test_normalised_weights(data: st.DataObject, normalize: str) -> None:
    routing = data.draw(routings())
    selection = run(routing, data.draw(capacities(routing)), normalize=normalize)
    weight = selection.combine_weight
    assert not bool(weight[~selection.kept].any())
    total = torch.zeros(routing.num_tokens).index_add(0, routing.token, weight)
    assert bool((total <= 1 + 1e-6).all())
    if normalize == "kept":
        served = torch.zeros(routing.num_tokens, dtype=torch.bool)
        served[routing.token[selection.kept]] = True
        torch.testing.assert_close(total, served.float())


@given(
    st.floats(0.01, 4.0),
    st.integers(0, 10_000),
    st.integers(1, 8),
    st.integers(1, 64),
    st.integers(0, 100),
)
def test_capacity_is_monotone_and_never_too_small(
    factor: float, num_tokens: int, top_k: int, num_experts: int, more: int
) -> None:
    exact = factor * num_tokens * top_k / num_experts
    found = capacity_tokens(factor, num_tokens, top_k, num_experts)
    assert exact - 1e-5 <= found < exact + 1
    assert capacity_tokens(factor, num_tokens + more, top_k, num_experts) >= found
    assert capacity_tokens(factor * 1.5, num_tokens, top_k, num_experts) >= found
    as_tensor = capacity_tokens(factor, torch.tensor(num_tokens), top_k, num_experts)
    assert abs(int(as_tensor) - found) <= (abs(exact - round(exact)) < 1e-5)
