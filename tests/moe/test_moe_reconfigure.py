"""`MoE.reconfigure`: as a layer built that way, with what was learned; and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import Collector, LossConfig, MoE, MoEConfig, after_step, reconfigured
from etr.moe.arranged import BUILT_IN
from etr.moe.options import OPTIONS

H, E = 16, 4
CHANGES: dict[str, dict[str, Any]] = {
    "router": {"router": "token_choice:gate=sigmoid"},
    "frame": {"router": "etr:frame=learned"},
    "capacity": {"capacity": "factor:capacity_factor=0.5"},
    "threshold": {"capacity": "threshold"},
    "rank_by": {"router": "token_choice", "rank_by": "position"},
    "normalize": {"normalize": "kept"},
    "losses": {"losses": "z:weight=0.5"},
    "scale": {"routed_scale": 2.0},
    "backend": {"backend": "loop"},
    "serving": {"eval_selection": "dropless"},
    "debug": {"debug": True},
    "bonus": {"local_bonus": 0.5},
    "dispatch": {"dispatch": "permute"},
    "several": {"router": "expert_choice", "capacity": "factor", "losses": LossConfig(z_beta=0.1)},
}


def config(**options: Any) -> MoEConfig:
    sizes = {"hidden_size": H, "intermediate_size": 8, "num_experts": E, "top_k": 2}
    return MoEConfig(**{**sizes, "router": "etr", "capacity": "schedule", **options})


def trained() -> MoE:
    """A layer after two steps."""
    torch.manual_seed(1)
    layer = MoE(config()).double()
    for _ in range(2):
        with Collector(layer):
            layer(tokens())
        after_step(layer)
    return layer


def tokens(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, H, dtype=torch.float64, generator=generator)


def outputs(layer: MoE) -> list[Tensor]:
    found = []
    for training in (True, False):
        layer.train(training)
        output = layer(tokens(6))
        found += [output.hidden_states, *output.losses.values(), *output.stats.values()]
    layer.train()
    return [value.detach() for value in found]


def assert_same(layer: MoE, other: MoE) -> None:
    state, expected = layer.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    for got, want in zip(outputs(layer), outputs(other), strict=True):
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_it_is_then_a_layer_of_that_config(options: dict[str, Any]) -> None:
    layer = trained().reconfigure(**options)
    other = MoE(config(**options)).double()
    assert layer.config == other.config
    other.load_state_dict(layer.state_dict())
    assert_same(layer, other)
    assert str(layer) == str(other)


def test_what_was_learned_stays_where_it_fits() -> None:
    layer, before = trained(), trained().state_dict()
    layer.reconfigure(
        capacity="schedule:end_factor=0.9", router="etr:temperature=2.0", rank_by="score"
    )
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert layer.has_thresholds()


@pytest.mark.parametrize("router", ["token_choice", "etr:frame=learned"])
def test_a_router_with_weights_of_its_own_starts_anew(router: str) -> None:
    layer = trained()
    weight = layer.router.get_parameter("weight").detach().clone()
    with Collector(layer):
        layer(tokens())
    assert layer.pending
    layer.reconfigure(router=router)
    assert not layer.pending
    assert not layer.has_thresholds()
    assert int(layer.state.step) == 0
    new = layer.router.get_parameter("weight")
    assert new.dtype == torch.float64
    assert not torch.equal(new, weight)


def test_scores_on_another_scale_need_other_thresholds() -> None:
    layer = trained().reconfigure(router="etr:score=cosine")
    assert not layer.has_thresholds()
    assert torch.equal(
        layer.router.get_parameter("weight"), trained().router.get_parameter("weight")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routers": "etr"}, "a layer has no option routers; it has router, capacity"),
        ({"top_k": 1}, "a layer has no option top_k"),
        ({"router": "hash", "capacity": "affinity_mass"}, "'affinity_mass' sums probabilities"),
        ({"capacity": "factor", "routed_scale": -1.0}, r"routed_scale=-1\.0 must be > 0"),
        ({"router": "random", "losses": "balance:weight=1"}, "losses: balance:weight=1: router"),
        ({"activation": "gelu", "router": "hash"}, "activation: experts are made of it"),
        ({"num_shared_experts": 1}, "num_shared_experts: experts are made of it"),
    ],
)
def test_what_is_refused_changes_nothing(options: dict[str, Any], message: str) -> None:
    layer = trained()
    with pytest.raises(ValueError, match=message):
        layer.reconfigure(**options)
    assert layer.config == config()
    assert_same(layer, trained())


def test_experts_of_a_whole_layer_stay_whole() -> None:
    parallel: Any = object()
    with pytest.raises(ValueError, match="the layer is whole; divide its experts"):
        trained().reconfigure(parallel=parallel)


def test_every_option_is_changed_or_refused() -> None:
    changed = {name for options in CHANGES.values() for name in options}
    assert changed | set(BUILT_IN) == set(OPTIONS)


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_for_the_time_being(options: dict[str, Any]) -> None:
    """Also where it has learned meanwhile, and where something fails."""
    layer = trained()
    router, capacity = layer.router, layer.capacity

    def learn_and_fail() -> None:
        assert layer.config == config(**options)
        with Collector(layer):
            layer(tokens())
        after_step(layer)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), reconfigured(layer, **options):
        learn_and_fail()
    assert (layer.router, layer.capacity) == (router, capacity)
    assert layer.config == config()
    assert_same(layer, trained())
