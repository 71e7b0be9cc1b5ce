"""Counters and places of experts."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import (
    Collector,
    ExpertPlacement,
    MoE,
    MoEConfig,
    RoutingContext,
    set_eval_selection,
)
from etr.moe.capacity import Factor, Threshold
from etr.moe.routing import Kept, Routing
from etr.moe.stats import add_stats, max_violation, routing_shares, routing_stats


def test_counters_by_hand() -> None:
    config = MoEConfig(
        hidden_size=4,
        intermediate_size=4,
        num_experts=2,
        router="etr_paper",
        capacity=Factor(capacity_factor=0.7),
    )
    x = torch.tensor(
        [[3.0, 1, 0, 0], [2, 2, 0, 0], [1, 1, 0, 1], [0, 0, 1, 1], [9, 9, 0, 0], [1, 0, 0, 0]]
    )
    mask = torch.tensor([True, True, True, True, False, True])
    stats = MoE(config)(x, RoutingContext(valid_mask=mask)).stats
    # Four tokens choose expert 0 and one expert 1; both keep ceil(0.7 * 5 / 2) = 2.
    assert stats["num_forwards"].item() == 1
    assert stats["num_valid_tokens"].item() == 5
    assert stats["num_choices_per_expert"].tolist() == [4, 1]
    assert stats["num_tokens_per_expert"].tolist() == [2, 1]
    assert stats["num_tokens_without_expert"].item() == 2
    assert stats["capacity_sum"].item() == 4
    assert stats["score_histogram"].sum(-1).tolist() == [4, 1]


def test_gate_sums_are_of_all_choices_and_of_the_kept_ones() -> None:
    config = MoEConfig(
        hidden_size=4,
        intermediate_size=4,
        num_experts=2,
        router="etr_paper",
        capacity=Factor(capacity_factor=0.5),
    )
    layer = MoE(config)
    x, context = torch.randn(20, 4), RoutingContext(valid_mask=torch.arange(20) < 17)
    routing, limit = layer.route(x.masked_fill(torch.arange(20)[:, None] >= 17, 0.0), context)
    found = layer.keep(routing, limit)
    selection = found.selection
    stats = layer.stats(routing, found)
    best = routing.probs.max(-1).values
    kept = selection.selection_map(routing).any(-1)
    torch.testing.assert_close(stats["gate_sum"], best[:17].sum())
    torch.testing.assert_close(stats["kept_gate_sum"], best[kept].sum())
    assert 0 < float(stats["kept_gate_sum"]) < float(stats["gate_sum"])


def test_dropless_counters() -> None:
    config = MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2, capacity="none", top_k=2)
    stats = MoE(config)(torch.randn(5, 4)).stats
    assert stats["num_tokens_per_expert"].tolist() == [5, 5]
    assert stats["capacity_sum"].item() == 10
    assert stats["num_tokens_without_expert"].item() == 0


def test_expert_choice_drops_nothing_but_leaves_tokens_alone() -> None:
    config = MoEConfig(
        hidden_size=4,
        intermediate_size=4,
        num_experts=2,
        router="expert_choice",
        capacity=Factor(capacity_factor=0.5),
    )
    stats = MoE(config)(torch.randn(8, 4)).stats
    assert stats["num_choices_per_expert"].tolist() == [2, 2]
    assert stats["num_tokens_per_expert"].tolist() == [2, 2]
    assert 4 <= stats["num_tokens_without_expert"].item() <= 6


def test_counters_are_detached_and_summable() -> None:
    layer = MoE(MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2))
    first, second = layer(torch.randn(5, 4)).stats, layer(torch.randn(3, 4)).stats
    total = add_stats(add_stats({}, first), second)
    assert total.keys() == first.keys()
    for name in total:
        assert not total[name].requires_grad
        assert torch.equal(total[name], first[name] + second[name])
    assert add_stats({"a": torch.ones(1)}, {"b": torch.ones(1)}).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("load", "want"), [([5, 5, 5, 5], 0.0), ([20, 0, 0, 0], 3.0), ([0, 0], 0.0), ([3, 1], 0.5)]
)
def test_max_violation(load: list[int], want: float) -> None:
    assert max_violation(torch.tensor(load)).item() == pytest.approx(want)
    rows = torch.tensor([load, load])
    assert max_violation(rows).tolist() == pytest.approx([want, want])


def test_placement() -> None:
    placement = ExpertPlacement.contiguous(8, 4, 2)
    assert placement.rank_of_expert == (0, 0, 1, 1, 2, 2, 3, 3)
    assert placement.node_of_rank == (0, 0, 1, 1)
    assert (placement.num_experts, placement.num_nodes) == (8, 2)
    assert placement.experts_on_node(1) == (4, 5, 6, 7)
    assert [placement.node_of_expert(e) for e in range(8)] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((8, 3, 1), "num_experts=8"), ((8, 4, 3), "num_ranks=4"), ((8, 4, 0), "num_nodes=0")],
)
def test_placement_that_does_not_divide(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPlacement.contiguous(*arguments)


def test_placement_on_unknown_ranks() -> None:
    with pytest.raises(ValueError, match=r"rank_of_expert\[1\]=2"):
        ExpertPlacement(rank_of_expert=(0, 2), node_of_rank=(0, 0))
    with pytest.raises(ValueError, match="at least one"):
        ExpertPlacement(rank_of_expert=(), node_of_rank=(0,))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("capacity", "per_choice"),
    [
        ("factor:capacity_factor=0.5", 0.5),
        ("factor:capacity_factor=2.0", 2.0),
        (Threshold(target=Factor(capacity_factor=1.5)), 1.5),
    ],
)
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_experts_that_choose_count_against_their_room(
    capacity: Any, per_choice: float, top_k: int
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "top_k": top_k}
    layer = MoE(MoEConfig(**sizes, router="expert_choice", capacity=capacity))
    x = torch.randn(64, 8)

    def shares() -> dict[str, float]:
        return routing_shares([layer(x).stats], top_k)

    trained = shares()
    assert trained["kept_fraction"] == 1.0
    assert trained["kept_per_choice"] == per_choice
    layer.eval()
    uncalibrated = shares()  # as dropless: each token's k best
    assert (uncalibrated["kept_fraction"], uncalibrated["kept_per_choice"]) == (1.0, 1.0)
    set_eval_selection(layer, "dropless")
    assert shares()["kept_fraction"] == 1.0
    set_eval_selection(layer, "threshold")
    layer.calibration.num_updates.fill_(1)
    scores = layer.route(x, RoutingContext())[0].scores
    assert scores is not None
    room = int(per_choice * 64 * top_k / 4)
    for kept in (room // 2, room, 64):  # too few, as many as there is room for, and all
        layer.calibration.threshold.copy_(scores.sort(0, descending=True).values[kept - 1])
        found = shares()
        assert found["kept_per_choice"] == kept * 4 / (64 * top_k)
        assert found["kept_fraction"] == min(1.0, kept / room)


def test_counters_are_found_once_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, calls = MoE(MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2)), []

    def counted(*given: Any) -> dict[str, Tensor]:
        calls.append(given)
        return routing_stats(*given)

    monkeypatch.setattr("etr.moe.layer.routing_stats", counted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.eval()
    x = torch.randn(5, 4)
    with Collector(layer) as collector:
        output = layer(x)
    assert not calls
    assert int(output.stats["num_valid_tokens"]) == 5
    assert dict(output.stats).keys() == collector.stats()[0].keys()
    assert len(calls) == 1
    copied = pickle.loads(pickle.dumps(output.stats))
    assert {k: v.tolist() for k, v in copied.items()} == {
        k: v.tolist() for k, v in layer.stats(*kept_of(layer, x)).items()
    }


def kept_of(layer: MoE, x: Tensor) -> tuple[Routing, Kept]:
    routing, limit = layer.route(x, RoutingContext())
    return routing, layer.keep(routing, limit)


def test_what_is_known_without_asking_counts_as_what_is_asked() -> None:
    """No mask, and a mask of real tokens alone: the counts and weights are the same."""
    for router in ("etr", "token_choice", "expert_choice"):
        for capacity in ("factor", "threshold"):
            config = MoEConfig(
                hidden_size=8,
                intermediate_size=4,
                num_experts=4,
                top_k=2,
                router=router,
                capacity=capacity,
                rank_by="score",
            )
            layer = MoE(config).double()
            for num_tokens in (0, 1, 9):
                x = torch.randn(num_tokens, 8, dtype=torch.float64)
                real = RoutingContext(valid_mask=torch.ones(num_tokens, dtype=torch.bool))
                one, other = layer(x), layer(x, real)
                assert torch.equal(one.hidden_states, other.hidden_states)
                assert one.stats.keys() == other.stats.keys()
                for name, value in one.stats.items():
                    assert torch.equal(value, other.stats[name]), name
