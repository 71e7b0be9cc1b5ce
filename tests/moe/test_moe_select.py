"""Selection against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe.routing import Limit, Routing
from etr.moe.select import (
    combine_weights,
    mass_prefix,
    queue_positions,
    select,
    token_pairs,
    top_experts,
)

T, E = 9, 3


def routing_of(
    scores: Tensor, expert: Tensor, mask: Tensor | None = None, **fields: Any
) -> Routing:
    """Routing with scores [T, E] and choices [T, k]; probabilities are a softmax."""
    mask = torch.ones(len(scores), dtype=torch.bool) if mask is None else mask
    token, flat = token_pairs(expert, mask, scores.shape[1])
    index = flat.clamp_max(scores.shape[1] - 1)
    probs = fields.pop("probs", scores.softmax(-1))
    values: dict[str, Any] = {
        "token": token,
        "expert": flat,
        "score": scores[token, index],
        "gate": probs[token, index],
        "valid_mask": mask,
        "scores": scores,
        "logits": scores,
        "probs": probs,
        "num_experts": scores.shape[1],
        "top_k": expert.shape[1],
    }
    return Routing(**{**values, **fields})


def coarse(*shape: int) -> Tensor:
    """Scores of few values, so that ties abound."""
    return torch.randint(0, 4, shape).float() / 4


def kept(routing: Routing, limit: Limit, **options: Any) -> set[tuple[int, int]]:
    options.setdefault("rank_by", "score")
    mask = select(routing, limit, **options).kept
    return set(zip(routing.token[mask].tolist(), routing.expert[mask].tolist(), strict=True))


def brute_force(
    scores: list[list[float]],
    chosen: list[list[int]],
    capacity: list[int],
    *,
    by_score: bool,
    pool: str,
) -> set[tuple[int, int]]:
    """Keep a pair if fewer than C_e rivals stand before it, counting rivals one by one."""
    found = set()
    for t, experts in enumerate(chosen):
        for e in experts:
            before = 0
            for s, other in enumerate(chosen):
                rival = e in other or pool == "all"
                ahead = s < t if not by_score else (-scores[s][e], s) < (-scores[t][e], t)
                before += s != t and rival and ahead
            if before < capacity[e]:
                found.add((t, e))
    return found


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("pool", ["choosers", "all"])
@pytest.mark.parametrize("rank_by", ["score", "position"])
@pytest.mark.parametrize("trial", range(5))
def test_selection_equals_brute_force(k: int, pool: str, rank_by: str, trial: int) -> None:
    if pool == "all" and rank_by == "position":
        pytest.skip("refused by the router")
    scores = coarse(T, E)
    expert = top_experts(scores, k)
    routing = routing_of(scores, expert)
    for capacity in itertools.product([0, 1, 2, 5], repeat=E):
        want = brute_force(
            scores.tolist(), expert.tolist(), list(capacity), by_score=rank_by == "score", pool=pool
        )
        limit = Limit(capacity=torch.tensor(capacity))
        assert kept(routing, limit, rank_by=rank_by, expert_pool=pool) == want


@pytest.mark.parametrize("few", [0, 1 << 10])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_are_chosen_best_first_and_ties_go_to_the_lower(
    k: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etr.moe.select.FEW", few)
    scores = coarse(200, 4)
    for row, found in zip(scores.tolist(), top_experts(scores, k).tolist(), strict=True):
        assert found == sorted(range(4), key=lambda e: (-row[e], e))[:k]
    assert top_experts(torch.zeros(5, 4), k).tolist() == [list(range(k))] * 5


def test_ties_between_tokens_go_to_the_lower_index() -> None:
    routing = routing_of(torch.zeros(50, 1), torch.zeros(50, 1, dtype=torch.int64))
    want = {(t, 0) for t in range(7)}
    assert kept(routing, Limit(capacity=torch.tensor([7]))) == want


@pytest.mark.parametrize("few", [0, 1 << 10])
@pytest.mark.parametrize("by_score", [True, False])
def test_queue_positions(by_score: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etr.moe.select.FEW", few)
    expert, score = torch.randint(0, E + 1, (40,)), coarse(40)
    found = queue_positions(expert, score if by_score else None, E).tolist()
    for e in range(E + 1):
        queue = [p for p in range(40) if expert[p] == e]
        if by_score:
            queue.sort(key=lambda p: (-float(score[p]), p))
        assert [found[p] for p in queue] == list(range(len(queue)))


def test_padding_makes_no_pair() -> None:
    mask = torch.tensor([True, False, True])
    token, expert = token_pairs(torch.tensor([[0, 1], [1, 2], [2, 0]]), mask, E)
    assert token.tolist() == [0, 0, 1, 1, 2, 2]
    assert expert.tolist() == [0, 1, E, E, 2, 0]


def test_padding_is_no_rival_even_among_all_tokens() -> None:
    scores = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.5, 0.0]])
    routing = routing_of(
        scores, torch.zeros(3, 1, dtype=torch.int64), torch.tensor([False, True, True])
    )
    limit = Limit(capacity=torch.tensor([1, 1]))
    for pool in ("choosers", "all"):
        assert kept(routing, limit, expert_pool=pool) == {(1, 0)}


def test_the_pool_of_all_tokens_drops_outranked_choosers() -> None:
    scores = torch.tensor([[0.9, 0.8], [0.5, 0.1]])  # token 0 outranks token 1 at expert 1 too
    routing = routing_of(scores, torch.tensor([[0], [1]]))
    limit = Limit(capacity=torch.tensor([1, 1]))
    assert kept(routing, limit, expert_pool="choosers") == {(0, 0), (1, 1)}
    assert kept(routing, limit, expert_pool="all") == {(0, 0)}


def test_a_minimum_score_keeps_what_reaches_it() -> None:
    scores = torch.tensor([[0.5], [0.25], [0.75]])
    routing = routing_of(scores, torch.zeros(3, 1, dtype=torch.int64))
    assert kept(routing, Limit(min_score=torch.tensor([0.5]))) == {(0, 0), (2, 0)}
    assert kept(routing, Limit(min_score=torch.tensor([float("inf")]))) == set()
    assert len(kept(routing, Limit(min_score=torch.tensor([-float("inf")])))) == 3
    both = Limit(min_score=torch.tensor([0.5]), capacity=torch.tensor([1]))
    assert kept(routing, both) == {(2, 0)}


def test_a_minimum_score_ignores_the_bonus() -> None:
    routing = routing_of(
        torch.tensor([[0.2]]), torch.zeros(1, 1, dtype=torch.int64), score=torch.tensor([5.0])
    )
    assert kept(routing, Limit(min_score=torch.tensor([0.3]))) == set()


@pytest.mark.parametrize("rho", [0.05, 0.3, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("k", [1, 2])
def test_mass_prefix_is_the_shortest(rho: float, k: int) -> None:
    scores = torch.randn(30, E)
    routing = routing_of(scores, top_experts(scores, k), torch.rand(30) > 0.2)
    found = mass_prefix(routing, rho).tolist()
    assert routing.probs is not None
    for e in range(E):
        queue = [p for p in range(len(routing.expert)) if routing.expert[p] == e]
        assert routing.score is not None
        queue.sort(key=lambda p: -float(routing.score[p]))
        probs = [float(routing.probs[routing.token[p], e]) for p in queue]
        total = sum(probs)
        assert sum(probs[: found[e]]) >= (rho - 1e-6) * total * (1 - 1e-9)
        if found[e]:
            assert sum(probs[: found[e] - 1]) < (rho - 1e-6) * total


def test_mass_prefix_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.2, 0.8], [0.9, 0.1]])
    expert = torch.tensor([[0], [0], [0], [1]])
    routing = routing_of(probs.log(), expert, probs=probs)
    # Expert 0's choosers hold 0.5, 0.3, 0.2 of 1; expert 1's one chooser is all it has.
    assert mass_prefix(routing, 0.5).tolist() == [1, 1]
    assert mass_prefix(routing, 0.51).tolist() == [2, 1]
    assert mass_prefix(routing, 0.8).tolist() == [2, 1]
    assert mass_prefix(routing, 0.81).tolist() == [3, 1]


def test_mass_prefix_sums_probabilities_where_gates_are_others() -> None:
    probs = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.2, 0.8]])
    routing = routing_of(
        probs.log(), torch.zeros(3, 1, dtype=torch.int64), probs=probs, gate=torch.ones(3)
    )
    assert mass_prefix(routing, 0.6).tolist() == [1, 0]


def test_mass_prefix_of_equal_probabilities_survives_rounding() -> None:
    probs = torch.full((10, 1), 0.1)
    routing = routing_of(probs, torch.zeros(10, 1, dtype=torch.int64), probs=probs)
    assert mass_prefix(routing, 0.7).tolist() == [7]
    assert mass_prefix(routing, 0.3).tolist() == [3]


@pytest.mark.parametrize("normalize", ["none", "chosen", "kept"])
def test_combine_weights_by_hand(normalize: str) -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]], dtype=torch.float64)
    routing = routing_of(probs, torch.tensor([[0, 1], [1, 2]]), probs=probs)
    mask = torch.tensor([True, False, False, False])
    want = {"none": 0.5, "chosen": 0.5 / 0.8, "kept": 1.0}[normalize]
    found = combine_weights(routing, ~mask, normalize)  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([want, 0, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize("normalize", ["none", "chosen", "kept"])
def test_weights_of_vanished_gates_are_zero_with_finite_gradients(normalize: str) -> None:
    gate = torch.zeros(4, requires_grad=True)
    scores = torch.zeros(2, 2)
    routing = routing_of(scores, torch.tensor([[0, 1], [0, 1]]), gate=gate)
    found = combine_weights(routing, torch.tensor([False, False, True, True]), normalize)  # type: ignore[arg-type]
    found.sum().backward()
    assert not found.any()
    assert gate.grad is not None
    assert torch.isfinite(gate.grad).all()


def test_no_gradient_flows_through_the_selection() -> None:
    scores = torch.randn(T, E, requires_grad=True)
    routing = routing_of(scores, top_experts(scores.detach(), 2), probs=torch.rand(T, E))
    assert not select(
        routing, Limit(capacity=torch.full((E,), 2)), rank_by="score"
    ).combine_weight.requires_grad


def test_dense_views() -> None:
    scores = torch.randn(T, E)
    routing = routing_of(scores, top_experts(scores, 2), torch.arange(T) < T - 2)
    selection = select(routing, Limit(capacity=torch.full((E,), 2)), rank_by="score")
    asked, got = routing.routing_map(), selection.selection_map(routing)
    assert asked.sum().item() == 2 * (T - 2)
    assert got.sum(0).tolist() == selection.num_tokens_per_expert.tolist()
    assert not (got & ~asked).any()
    assert not asked[T - 2 :].any()


@pytest.mark.parametrize("k", [2, 8, 64])
def test_one_integer_sort_orders_float32_scores_as_a_stable_sort_does(k: int) -> None:
    """Float64 takes the plain way: both must choose the same, ties and zeros of both signs too."""
    scores = torch.cat((coarse(100, 64), torch.randn(100, 64), 1e-40 * torch.randn(100, 64)))
    scores[::7] *= -0.0
    scores[::11, ::3] = -0.0
    assert torch.equal(top_experts(scores, k), top_experts(scores.double(), k))
    expert, score = torch.randint(0, E + 1, (scores.numel(),)), scores.flatten()
    found, want = (queue_positions(expert, s, E) for s in (score, score.double()))
    assert torch.equal(found, want)
    assert queue_positions(expert, None, E).dtype == torch.int64
