"""Scores of each router from its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import (
    ROUTERS,
    EtrPaper,
    EtrRouter,
    Hash,
    LocMoERouter,
    MoE,
    MoEConfig,
    Random,
    RoutingContext,
    TokenChoice,
    reference,
)
from etr.moe.routing import Routing

H, E, T = 16, 4, 40


def make(router: Any, top_k: int = 1, **options: Any) -> MoE:
    values: dict[str, Any] = {"capacity": None, **options}
    config = MoEConfig(
        hidden_size=H, intermediate_size=4, num_experts=E, top_k=top_k, router=router, **values
    )
    return MoE(config, layer_index=options.pop("layer_index", 0)).double()


def route(layer: MoE, x: Tensor, **fields: Any) -> Routing:
    return layer.route(x, RoutingContext(**fields))[0]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


@pytest.mark.parametrize("temperature", [None, 0.5, 3.0])
@pytest.mark.parametrize("kind", [EtrPaper, LocMoERouter])
def test_cosine_routers(kind: Any, temperature: float | None) -> None:
    x = torch.randn(T, H, dtype=torch.float64)
    routing = route(make(kind(temperature=temperature)), x)
    affinity = reference.grap(x, E)
    scale = math.sqrt(H) if temperature is None else temperature
    assert routing.scores is not None
    assert routing.probs is not None
    assert routing.logits is not None
    torch.testing.assert_close(routing.scores, affinity)
    torch.testing.assert_close(routing.logits, affinity * scale)
    for t, row in enumerate(affinity.tolist()):
        want = softmax([scale * v for v in row])
        best = max(range(E), key=lambda e: row[e])
        assert routing.probs[t].tolist() == pytest.approx(want)
        assert int(routing.expert[t]) == best
        assert float(routing.gate[t]) == pytest.approx(want[best])


@pytest.mark.parametrize("router", ["etr_paper", "etr"])
def test_standard_deviation_of_the_logits_of_isotropic_tokens(router: str) -> None:
    routing = route(make(router), torch.randn(20000, H, dtype=torch.float64))
    assert routing.logits is not None
    assert float(routing.logits.detach().std()) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("score", ["cosine", "prob"])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("frame", ["fixed", "learned", "orthonormal"])
def test_what_ranks_and_what_weighs_in_etr(frame: Any, gate: Any, score: Any) -> None:
    layer = make(EtrRouter(frame=frame, gate=gate, score=score, temperature=2.5), top_k=2)
    if gate == "sigmoid":
        layer.router.get_parameter("offset").data.fill_(-0.7)
    x = torch.randn(T, H, dtype=torch.float64)
    routing = route(layer, x)
    directions = torch.block_diag(*torch.ones(E, 1, H // E, dtype=torch.float64))
    if frame == "orthonormal":
        directions = layer.router.get_parameter("weight").detach()  # orthonormal at the start
    assert routing.scores is not None
    assert routing.probs is not None
    for t in range(T):
        norms = float(x[t].norm()) * directions.norm(dim=-1)
        affinity = [float(a) for a in (directions @ x[t]) / norms]
        logits = [2.5 * a for a in affinity]
        probs = softmax(logits)
        gates = probs if gate == "softmax" else [1 / (1 + math.exp(0.7 - v)) for v in logits]
        best = reference.top_k(affinity, 2)
        pairs = slice(2 * t, 2 * t + 2)
        assert routing.expert[pairs].tolist() == best
        assert routing.gate[pairs].tolist() == pytest.approx([gates[e] for e in best], rel=1e-5)
        assert routing.probs[t].tolist() == pytest.approx(probs, rel=1e-5)
        ranked = affinity if score == "cosine" else probs
        assert routing.scores[t].tolist() == pytest.approx(ranked, rel=1e-5, abs=1e-6)
    assert layer.traits.has_cosine == (score == "cosine")


def test_a_learned_temperature_starts_at_the_given_one_and_trains() -> None:
    layer = make(EtrPaper(learn_temperature=True, temperature=3.0))
    x = torch.randn(T, H, dtype=torch.float64)
    routing = route(layer, x)
    assert routing.logits is not None
    torch.testing.assert_close(
        routing.logits.detach(), 3.0 * reference.grap(x, E), rtol=1e-6, atol=1e-6
    )
    layer(x).hidden_states.sum().backward()
    assert float(layer.router.get_parameter("log_temperature").grad) != 0  # type: ignore[arg-type]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_token_choice(gate: str, top_k: int) -> None:
    layer = make(TokenChoice(gate=gate), top_k)  # type: ignore[arg-type]
    x = torch.randn(T, H, dtype=torch.float64)
    routing = route(layer, x)
    weight = layer.router.get_parameter("weight").detach()
    assert routing.probs is not None
    for t in range(T):
        logits = [float((x[t] * weight[e]).sum()) for e in range(E)]
        gates = softmax(logits) if gate == "softmax" else [1 / (1 + math.exp(-v)) for v in logits]
        best = sorted(range(E), key=lambda e: -logits[e])[:top_k]
        pairs = slice(t * top_k, (t + 1) * top_k)
        assert routing.expert[pairs].tolist() == best
        assert routing.gate[pairs].tolist() == pytest.approx([gates[e] for e in best])
        assert routing.probs[t].tolist() == pytest.approx([g / sum(gates) for g in gates])


def test_sigmoid_probabilities_are_finite_where_every_gate_underflows() -> None:
    layer = make(TokenChoice(gate="sigmoid")).float()
    with torch.no_grad():
        layer.router.get_parameter("weight").fill_(-100.0)
    x = torch.rand(T, H, requires_grad=True)
    output = layer(x)
    output.losses["aux"].backward()
    assert torch.isfinite(output.losses["aux"])
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_expert_choice_takes_the_best_of_all_tokens() -> None:
    layer = make("expert_choice", capacity="factor")
    x = torch.randn(T, H, dtype=torch.float64)
    routing, limit = layer.route(x, RoutingContext())
    kept = layer.keep(routing, limit).selection.selection_map(routing)
    assert routing.probs is not None
    count = math.ceil(1.1 * T / E)
    for e in range(E):
        column = routing.probs[:, e].tolist()
        best = sorted(range(T), key=lambda t: -column[t])[:count]
        assert kept[:, e].nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("choice", ["both", "token", "expert"])
def test_who_chooses_in_etr(choice: str) -> None:
    layer = make(EtrPaper(choice=choice), top_k=2, capacity="factor")  # type: ignore[arg-type]
    x = torch.randn(T, H, dtype=torch.float64)
    x[:, :4] += 1
    routing, limit = layer.route(x, RoutingContext())
    kept = layer.keep(routing, limit).selection.selection_map(routing)
    affinity, count = reference.grap(x, E).tolist(), math.ceil(1.1 * T * 2 / E)
    for e in range(E):
        pool = [t for t in range(T) if choice == "expert" or e in reference.top_k(affinity[t], 2)]
        if choice != "token":
            pool.sort(key=lambda t, e=e: -affinity[t][e])
        assert kept[:, e].nonzero().flatten().tolist() == sorted(pool[:count])


@pytest.mark.parametrize("router", [Hash(), Random()])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_unlearned_routers_draw_distinct_experts_evenly(router: Any, top_k: int) -> None:
    n = 20000
    layer = make(router, top_k, capacity="none")
    routing = route(layer, torch.zeros(n, H, dtype=torch.float64), token_ids=torch.arange(n))
    drawn = routing.expert.view(n, top_k)
    assert all(len(set(row)) == top_k for row in drawn[:200].tolist())
    share = routing.num_choices_per_expert() / n
    assert share.tolist() == pytest.approx([top_k / E] * E, abs=0.015)
    if top_k == 2:  # all sets alike
        count = torch.bincount(drawn[:, 0] * E + drawn[:, 1], minlength=E * E) / n
        off = count[count > 0]
        assert len(off) == E * (E - 1) // 2
        assert off.tolist() == pytest.approx([2 / (E * (E - 1))] * len(off), abs=0.012)
    assert torch.equal(routing.gate, torch.full_like(routing.gate, 1 / top_k))


def hashed(seed: int = 0, layer_index: int = 0, token_ids: Tensor | None = None) -> Tensor:
    config = MoEConfig(
        hidden_size=H, intermediate_size=4, num_experts=E, router=Hash(seed=seed), capacity="none"
    )
    ids = torch.arange(500) if token_ids is None else token_ids
    return route(MoE(config, layer_index), torch.randn(len(ids), H), token_ids=ids).expert


def test_hash_depends_on_seed_layer_and_token_id_alone() -> None:
    base = hashed()
    assert torch.equal(hashed(), base)  # other hidden states
    order = torch.randperm(500)
    assert torch.equal(hashed(token_ids=order), base[order])
    for other in (hashed(seed=1), hashed(layer_index=1)):
        assert 0.6 < float((other != base).float().mean()) < 0.9  # independent: 3/4 differ


def random_draw(seed: int = 0, layer_index: int = 0, step: int = 0, offset: int = 0) -> Tensor:
    config = MoEConfig(
        hidden_size=H, intermediate_size=4, num_experts=E, router=Random(seed=seed), capacity="none"
    )
    layer = MoE(config, layer_index)
    layer.state.step.fill_(step)
    return route(layer, torch.randn(500, H), global_token_offset=offset).expert


def test_random_depends_on_seed_step_layer_and_global_index_alone() -> None:
    base = random_draw()
    assert torch.equal(random_draw(), base)
    assert torch.equal(random_draw(offset=100)[:-100], base[100:])
    for other in (
        random_draw(seed=1),
        random_draw(layer_index=1),
        random_draw(step=1),
        random_draw(step=7, seed=1),
    ):
        assert 0.6 < float((other != base).float().mean()) < 0.9


def test_hash_names_what_it_misses() -> None:
    with pytest.raises(ValueError, match="token_ids"):
        make("hash")(torch.randn(3, H, dtype=torch.float64))


@pytest.mark.parametrize("name", list(ROUTERS))
def test_scores_lie_in_the_range_that_calibration_bins(name: str) -> None:
    layer = make(name).float()
    routing = route(layer, 30 * torch.randn(200, H), token_ids=torch.arange(200))
    assert (routing.scores is not None) == layer.traits.has_scores
    assert (routing.probs is not None) == layer.traits.has_probs
    if routing.scores is not None:
        assert float(routing.scores.abs().max()) <= 1 + 1e-6
        assert not routing.scores.requires_grad
    if routing.probs is not None:
        torch.testing.assert_close(routing.probs.sum(-1), torch.ones(200))
