"""Every mistake in a config or an input is named, with its value and what would be right."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from etr.moe import (
    CAPACITIES,
    ROUTERS,
    EtrPaper,
    EtrRouter,
    LocMoERouter,
    LossConfig,
    MoE,
    MoEConfig,
    RoutingContext,
    TokenChoice,
    set_eval_selection,
    support_table,
)
from etr.moe.capacity import AffinityMass, Factor, LocMoE, Schedule, Threshold
from etr.moe.context import Replay

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 4}
NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 18, "router": "etr_paper"}, r"hidden_size=18 .*num_experts=4"),
        ({"hidden_size": 18, "router": EtrRouter(frame="learned")}, r"hidden_size=18 .*num_exp"),
        ({"num_experts": 32}, r"num_experts=32 exceeds hidden_size=16"),
        ({"hidden_size": 18, "router": "locmoe"}, r"hidden_size=18 .*num_experts=4"),
        ({"num_experts": 32, "router": EtrRouter(frame="orthonormal")}, r"num_experts=32.*hidden"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 5}, r"top_k=5 exceeds num_experts=4"),
        (
            {"router": EtrRouter(expert_pool="all"), "capacity": "threshold"},
            "counts an expert's choosers, and expert_pool='all'",
        ),
        (
            {"router": EtrRouter(expert_pool="all"), "capacity": "affinity_mass"},
            "counts an expert's choosers, and expert_pool='all'",
        ),
        ({"top_k": 2, "router": "baseline"}, r"top_k=2: router 'baseline'.*top_k=1"),
        ({"top_k": 2, "router": "locmoe"}, r"top_k=2: router 'locmoe'.*top_k=1"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1"),
        ({"normalize": "chosen"}, r"normalize='chosen' with top_k=1"),
        ({"normalize": "kept"}, r"normalize='kept' with top_k=1"),
        ({"normalize": "all", "top_k": 2}, r"normalize='all' must be one of.*chosen"),
        ({"router": "switch"}, r"router='switch' is unknown.*token_choice"),
        ({"capacity": "big"}, r"capacity='big' is unknown.*schedule"),
        ({"activation": "relu"}, r"activation='relu' must be one of.*swiglu"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown.*grouped_mm"),
        ({"dispatch": "alltoall"}, r"dispatch='alltoall' is unknown.*permute"),
        ({"eval_selection": "best"}, r"eval_selection='best' is unknown; choose one of.*dropless"),
        ({"rank_by": "random"}, r"rank_by='random' must be one of.*score"),
        ({"rank_by": "position"}, r"rank_by='position' .*'etr'"),
        ({"router": "hash", "rank_by": "score"}, r"rank_by='score' .*'hash'"),
        ({"router": "expert_choice", "capacity": "none"}, r"'none'.*'expert_choice'"),
        ({"router": "hash", "capacity": "affinity_mass"}, r"'affinity_mass'.*'hash'"),
        ({"router": "baseline", "capacity": "threshold"}, r"'threshold'.*'baseline'"),
        ({"router": "token_choice", "capacity": "locmoe"}, r"'locmoe'.*'token_choice'"),
        ({"router": "token_choice", "capacity": Factor(floor="erfc")}, r"floor='erfc'"),
        ({"capacity": "locmoe"}, r"'locmoe'.*'etr'.*etr_paper"),
        ({"capacity": Factor(floor="erfc")}, r"floor='erfc'.*'etr'.*etr_paper"),
        ({"router": EtrPaper(score="prob"), "capacity": "locmoe"}, r"'locmoe'.*'etr_paper'"),
        (
            {"router": "token_choice", "capacity": "threshold", "rank_by": "position"},
            r"'threshold'.*rank_by='score'",
        ),
        ({"router": "hash", "losses": LossConfig(aux_alpha=0.1)}, r"aux_alpha=0\.1.*'hash'"),
        ({"router": "random", "losses": LossConfig(z_beta=0.1)}, r"z_beta=0\.1.*'random'"),
        ({"router": "hash", "losses": LossConfig(locality_mu=1.0)}, r"locality_mu=1\.0.*'hash'"),
        ({"router": "expert_choice", "losses": LossConfig(aux_alpha=0.1)}, r"aux_alpha=0\.1"),
        ({"router": "hash", "local_bonus": 0.5}, r"local_bonus=0\.5.*'hash'"),
    ],
)
def test_mistakes_in_a_layer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{**SIZES, **options})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Factor, {"capacity_factor": 0.0}, r"capacity_factor=0\.0 must be .* > 0"),
        (Factor, {"capacity_factor": -1.0}, r"capacity_factor=-1\.0"),
        (Factor, {"capacity_factor": NAN}, "capacity_factor=nan"),
        (Factor, {"capacity_factor": float("inf")}, "capacity_factor=inf"),
        (Factor, {"min_capacity": -1}, "min_capacity=-1"),
        (Factor, {"floor": "exact"}, "floor='exact' must be one of none, erfc"),
        (Schedule, {"start_factor": 0.0}, r"start_factor=0\.0"),
        (Schedule, {"end_factor": NAN}, "end_factor=nan"),
        (Schedule, {"start": 0.8}, r"start=0\.8, end=0\.7"),
        (Schedule, {"end": 1.5}, r"end=1\.5"),
        (Schedule, {"start": NAN}, "start=nan"),
        (Schedule, {"num_stages": 1}, "num_stages=1 must be at least 2"),
        (Schedule, {"steps": 0}, "steps=0"),
        (AffinityMass, {"rho": 0.0}, r"rho=0\.0 must lie in \(0, 1\]"),
        (AffinityMass, {"rho": 1.1}, r"rho=1\.1"),
        (AffinityMass, {"rho": NAN}, "rho=nan"),
        (AffinityMass, {"mode": "mean"}, "mode='mean' must be one of ragged, common"),
        (Threshold, {"floor": "erfc"}, "floor='erfc' does not go with thresholds"),
        (Threshold, {"target": Factor(floor="erfc")}, "floor='erfc' does not go with thresholds"),
        (Threshold, {"min_capacity": 4}, "min_capacity=4 does not go with thresholds"),
        (LocMoE, {"min_factor": 0.0}, r"min_factor=0\.0"),
        (LocMoE, {"max_factor": 0.5}, r"max_factor=0\.5 must be at least min_factor=1\.0"),
        (LocMoE, {"max_factor": NAN}, "max_factor=nan"),
        (LocMoE, {"max_factor": float("inf")}, "max_factor=inf"),
        (EtrRouter, {"frame": "free"}, r"frame='free' must be one of fixed, learned, ortho"),
        (EtrRouter, {"choice": "none"}, "choice='none' must be one of both, token, expert"),
        (EtrRouter, {"expert_pool": "some"}, "expert_pool='some' must be one of choosers, all"),
        (EtrRouter, {"expert_pool": "all", "choice": "expert"}, "expert_pool='all' needs choice"),
        (EtrRouter, {"gate": "tanh"}, "gate='tanh' must be one of softmax, sigmoid"),
        (EtrRouter, {"score": "logit"}, "score='logit' must be one of cosine, prob"),
        (EtrRouter, {"temperature": 0.0}, r"temperature=0\.0 must be > 0, or None for sqrt"),
        (EtrPaper, {"temperature": 0.0}, r"temperature=0\.0 must be > 0, or None for sqrt"),
        (EtrRouter, {"temperature": NAN}, "temperature=nan"),
        (LocMoERouter, {"temperature": -1.0}, r"temperature=-1\.0"),
        (TokenChoice, {"gate": "tanh"}, "gate='tanh' must be one of softmax, sigmoid"),
        (LossConfig, {"aux_alpha": -0.1}, r"aux_alpha=-0\.1 must be >= 0"),
        (LossConfig, {"z_beta": NAN}, "z_beta=nan"),
        (LossConfig, {"locality_mu": -1.0}, r"locality_mu=-1\.0"),
        (LossConfig, {"aux_mode": "global"}, "aux_mode='global' must be one of micro"),
        (LossConfig, {"locality_epsilon": 0.0}, r"locality_epsilon=0\.0 must lie in \(0, 1\]"),
    ],
)
def test_mistakes_in_a_part(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_defaults_of_the_method() -> None:
    config = MoEConfig(**SIZES)
    router = config.router_config
    assert isinstance(router, EtrRouter)
    assert (router.frame, router.choice, router.expert_pool) == ("orthonormal", "both", "choosers")
    assert (router.gate, router.score, router.learn_temperature) == ("softmax", "prob", True)
    assert config.top_k == 1
    assert config.resolved_normalize == "none"
    assert MoEConfig(**SIZES, top_k=2).resolved_normalize == "chosen"
    assert config.capacity_config == Schedule(start_factor=0.4, end_factor=1.1)
    assert (config.capacity_config.min_capacity, config.capacity_config.floor) == (1, "none")
    assert config.loss_weights["balance"] == 0.01
    assert (config.losses.aux_mode, config.losses.z_beta) == ("ranks", 0.0)
    assert config.eval_selection == "threshold"
    assert config.resolved_rank_by == "score"
    baseline = MoEConfig(**SIZES, router="baseline")
    assert baseline.capacity_config == Factor(capacity_factor=1.1)
    assert baseline.resolved_rank_by == "position"
    assert baseline.loss_weights["balance"] == 0.01
    assert MoEConfig(**SIZES, router="expert_choice").loss_weights["balance"] == 0.0
    assert AffinityMass().rho == 0.7
    assert (LocMoE().min_factor, LocMoE().max_factor) == (1.0, 1.1)


def test_defaults_of_the_published_method() -> None:
    config = MoEConfig(**SIZES, router="etr_paper")
    router = config.router_config
    assert isinstance(router, EtrPaper)
    assert (router.frame, router.choice, router.expert_pool) == ("fixed", "both", "choosers")
    assert (router.gate, router.score, router.learn_temperature) == ("softmax", "cosine", False)
    assert config.top_k == 1
    assert config.capacity_config == Schedule()
    assert (config.capacity_config.min_capacity, config.capacity_config.floor) == (1, "none")
    assert config.resolved_rank_by == "score"
    assert config.loss_weights["balance"] == 0.01


ROUND_TRIP = [
    *(
        MoEConfig(**SIZES, router=router, capacity=capacity)
        for (router, capacity), reason in support_table().items()
        if reason is None
    ),
    MoEConfig(
        **SIZES,
        top_k=2,
        router=EtrRouter(frame="orthonormal", temperature=2.0, learn_temperature=True),
        capacity=Threshold(target=AffinityMass(rho=0.3, mode="common")),
        losses=LossConfig(aux_alpha=0.5, aux_mode="previous", z_beta=0.1),
        normalize="kept",
        num_shared_experts=2,
        backend="bmm",
        eval_selection="dropless",
        local_bonus=0.5,
        debug=True,
    ),
]


@pytest.mark.parametrize("config", ROUND_TRIP)
def test_round_trip_through_json(config: MoEConfig) -> None:
    again = MoEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.router_config == config.router_config
    assert again.capacity_config == config.capacity_config
    assert again.losses == config.losses
    assert MoEConfig.from_dict(again.to_dict()) == again


def test_round_trip_covers_the_tables() -> None:
    assert {c.router_config.name for c in ROUND_TRIP} == set(ROUTERS)
    assert {c.capacity_config.name for c in ROUND_TRIP} == set(CAPACITIES)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": "red"}, "MoEConfig has no field colour"),
        ({"router": {"name": "nobody"}}, r"router='nobody' is unknown"),
        ({"router": {"frame": "fixed"}}, r"router=None is unknown"),
        ({"router": {"name": "etr", "colour": 1}}, r"'etr' has no option colour; it has .*frame"),
        ({"capacity": {"name": "factor", "rho": 1}}, r"'factor' has no option rho"),
        ({"capacity": {"name": "threshold", "target": {"name": "x"}}}, r"target='x' is unknown"),
    ],
)
def test_unknown_names_in_a_dictionary(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_dict({**SIZES, **values})


def layer(**options: Any) -> MoE:
    return MoE(MoEConfig(**{**SIZES, **options}))


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (torch.ones(3, 16, dtype=torch.int64), {}, r"dtype torch.int64; it must be floating"),
        (torch.ones(3, 15), {}, r"shape \(3, 15\); its last dimension must be hidden_size=16"),
        (torch.ones(3, 16), {"valid_mask": torch.ones(4, dtype=torch.bool)}, r"valid_mask.*\(3,\)"),
        (torch.ones(2, 3, 16), {"valid_mask": torch.ones(6) > 0}, r"valid_mask.*\(6,\).*\(2, 3\)"),
        (torch.ones(3, 16), {"valid_mask": torch.ones(3)}, "valid_mask has dtype torch.float32"),
        (torch.ones(3, 16), {"token_ids": torch.ones(3, 1)}, r"token_ids has shape \(3, 1\)"),
        (torch.ones(3, 16), {"token_ids": torch.ones(2)}, r"token_ids has shape \(2,\)"),
    ],
)
def test_mistakes_in_an_input(x: torch.Tensor, context: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer()(x, RoutingContext(**context))


@pytest.mark.parametrize(
    ("expert", "error", "message"),
    [
        ([[0], [1], [2]], TypeError, "replay.expert is list; it must be a tensor of integers"),
        (torch.zeros(3, 1), ValueError, "replay.expert has dtype torch.float32"),
        (torch.zeros(3, 1, dtype=torch.bool), ValueError, "replay.expert has dtype torch.bool"),
        (torch.zeros(3).long(), ValueError, r"replay.expert has shape \(3,\); it must be \[T, k\]"),
        (torch.zeros(3, 0).long(), ValueError, r"shape \(3, 0\).*k from 1 to num_experts=4"),
        (torch.zeros(3, 5).long(), ValueError, r"shape \(3, 5\).*k from 1 to num_experts=4"),
        (torch.zeros(2, 1).long(), ValueError, "has 2 rows; it must have 3, one row per token"),
        (torch.tensor([[0], [-2], [1]]), ValueError, "holds -2; experts are 0 to 3, and -1 or 4"),
        (torch.tensor([[0], [5], [1]]), ValueError, "holds 5; experts are 0 to 3, and -1 or 4"),
        (torch.tensor([[0], [255], [1]], dtype=torch.uint8), ValueError, "holds 255; experts"),
    ],
)
def test_mistakes_in_replayed_choices(expert: Any, error: type[Exception], message: str) -> None:
    context = RoutingContext(replay={0: Replay(expert=expert)})
    with pytest.raises(error, match=message):
        layer()(torch.randn(3, 16), context)


INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_replayed_choices_of_any_integers(dtype: torch.dtype) -> None:
    """Unused places, experts named twice, and rows of several sequences."""
    given = torch.tensor([[[2, 0], [1, 1]], [[4, 3], [4, 4]]])
    wanted = torch.tensor([[2, 0], [1, 4], [4, 3], [4, 4]])
    found = Replay(expert=given.to(dtype)).checked(4)
    assert torch.equal(found.expert, wanted)
    assert found.expert.dtype == torch.int64
    if dtype.is_signed:
        minus = given.masked_fill(given == 4, -1).to(dtype)
        assert torch.equal(Replay(expert=minus).checked(4).expert, wanted)
    assert found.num_experts == 4
    assert Replay(expert=torch.zeros(0, 2, dtype=dtype)).checked(4).expert.shape == (0, 2)


@pytest.mark.parametrize(("k", "normalize"), [(1, "none"), (3, "none"), (3, "chosen")])
def test_replayed_choices_of_another_k_are_those_of_a_layer_with_that_k(
    k: int, normalize: str
) -> None:
    """Where nothing is dropped: weights are made up of the choices that are given."""
    options = {**SIZES, "router": "token_choice", "capacity": "none", "normalize": normalize}
    own, other = (MoE(MoEConfig(**{**options, "top_k": n})).eval() for n in (2, k))
    other.load_state_dict(own.state_dict())
    x = torch.randn(6, 16)
    chosen = other.route(x, RoutingContext())[0].expert.view(6, k)
    found = own(x, RoutingContext(replay={0: Replay(expert=chosen)})).hidden_states
    torch.testing.assert_close(found, other(x).hidden_states, rtol=0, atol=0)


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_debug_names_the_layer_that_gets_bad_values(value: float) -> None:
    x = torch.ones(2, 3, 16)
    x[1, 2, 5] = value
    bad = MoE(MoEConfig(**SIZES, debug=True), layer_index=7)
    with pytest.raises(ValueError, match=r"layer 7 .*1 of 6 tokens"):
        bad(x)
    layer()(x)  # unchecked otherwise


def test_eval_selection_by_name() -> None:
    moe = layer()
    set_eval_selection(moe, "dropless")
    assert moe.eval_selection == "dropless"
    with pytest.raises(ValueError, match=r"selection='top'.*threshold, dropless, batch"):
        set_eval_selection(moe, "top")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_printing_a_layer_names_what_it_does(backend: str) -> None:
    text = repr(layer(backend=backend))
    for part in ("num_experts=4", "top_k=1", "router=etr", "capacity=schedule", "rank_by=score"):
        assert part in text
