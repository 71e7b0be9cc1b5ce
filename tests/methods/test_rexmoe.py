"""ReXMoE: what a layer may use, when, and that the rest is token choice."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor

from etr.methods.rexmoe import Lending, Widening
from etr.moe import Collector, MoE, MoEConfig, RoutingContext, moe_layers, set_progress
from etr.moe.layers import tie_experts


def group(size: int = 2, **options: object) -> torch.nn.ModuleList:
    """Layers that share 8 experts, in float64."""
    router = f"lending:group={size},start=0.25,until=0.75"
    config = layer_of(
        "rexmoe",
        **{"router": router, "experts": f"shared:layers={size}", "num_experts": 8, **options},
    ).config
    layers = torch.nn.ModuleList(MoE(config, place) for place in range(size)).double()
    tie_experts(list(layers))
    return layers


def plain(num_experts: int, **options: object) -> MoE:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "top_k": 1}
    config = MoEConfig(
        **{
            **sizes,
            "num_experts": num_experts,
            "router": "token_choice",
            "capacity": "none",
            **options,
        }
    )
    return MoE(config).double()


def test_how_many_experts_a_layer_has() -> None:
    """N = 4, r = 2, from step 10 to 30: 4, 4, 5, 6, 7, 8 at 0, 10, 15, 20, 25 and 30."""
    widening, seen = Widening(4, 8, 10 / 100, 30 / 100), []
    for step in (0, 10, 15, 20, 25, 30, 100):
        widening.set_progress(step / 100)
        seen.append(int(widening.count))
    assert seen == [4, 4, 5, 6, 7, 8, 8]


@pytest.mark.criterion
def test_layers_have_their_own_experts_and_then_each_others() -> None:
    """A group of 1 is token choice bit for bit; until lending starts a group of 2 computes what two
    plain layers with its blocks of experts and router rows do; experts that a layer does not have
    yet get weight 0 and no token, and of 8 it has 4, 5, 6, 7 and 8 as training goes. Four layers
    have as many parameters of experts in groups of 1, 2 and 4."""
    x = torch.randn(64, 16, dtype=torch.float64)
    (alone,), whole = group(1), plain(8)
    whole.load_state_dict(alone.state_dict(), strict=False)
    found, want = alone(x), whole(x)
    assert torch.equal(found.hidden_states, want.hidden_states)
    torch.testing.assert_close(found.losses["pool_balance"], want.losses["aux"], rtol=1e-12, atol=0)

    layers = group()
    for place, layer in enumerate(layers):
        other, own = plain(4), slice(4 * place, 4 * place + 4)
        with torch.no_grad():
            other.router.weight.copy_(layer.router.weight[own])
            for name, value in layer.experts.named_parameters():
                other.experts.get_parameter(name).copy_(value[own])
        found, want = layer(x), other(x)
        torch.testing.assert_close(found.hidden_states, want.hidden_states, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(learn(layer, x)["pool_balance"], want.losses["aux"])
    seen = []
    for progress in (0.25, 0.375, 0.5, 0.625, 0.75):
        set_progress(layers, progress)
        for place, layer in enumerate(layers):
            routing = decide(layer, x).routing
            closed = ~layer.router.is_open(place)
            assert not closed[4 * place : 4 * place + 4].any()
            assert not routing.probs[:, closed].any()
            assert not routing.routing_map()[:, closed].any()
        seen.append(8 - int(closed.sum()))
    assert seen == [4, 5, 6, 7, 8]

    counts = set()
    for size in (1, 2, 4):
        four = torch.nn.ModuleList(
            layer for _ in range(4 // size) for layer in group(size, num_experts=4 * size)
        )
        names = [name for name, _ in four.named_parameters() if ".experts." in name]
        counts.add(sum(four.get_parameter(name).numel() for name in names))
    assert counts == {4 * 4 * 3 * 16 * 8}


def test_inner_steps_have_the_experts_of_their_layer() -> None:
    for place, layer in enumerate(group(inner_steps=2)):
        other = MoE(layer.config, place).double()
        for step in moe_layers(other):
            mass = step.route(torch.randn(5, 16).double(), RoutingContext())[0].probs.sum(0)
            assert (mass > 0).nonzero().flatten().tolist() == list(range(4 * place, 4 * place + 4))


def test_experts_stay_once_they_are_lent_and_layers_get_others() -> None:
    layers, before = group(4, num_experts=16), [torch.zeros(16, dtype=torch.bool)] * 4
    for progress in torch.linspace(0.25, 0.75, 13).tolist():
        set_progress(layers, progress)
        now = [layer.router.is_open(layer.layer_index) for layer in layers]
        assert all((new >= old).all() for new, old in zip(now, before, strict=True))
        before = now
    set_progress(layers, 0.5)
    orders = {tuple(layer.router.is_open(place).tolist()) for place, layer in enumerate(layers)}
    assert len(orders) == 4


def test_the_loss_of_a_group_is_the_mean_of_its_layers_until_lending_starts() -> None:
    """And with all experts open that of the pool: 8 times load and probability of both together."""
    layers, x = group(), torch.randn(2, 32, 16, dtype=torch.float64)

    def collected() -> Tensor:
        with Collector(layers) as collector:
            for layer, rows in zip(layers, x, strict=True):
                layer(rows)
        return collector.losses()["pool_balance"]

    each = [learn(layer, rows)["pool_balance"] for layer, rows in zip(layers, x, strict=True)]
    torch.testing.assert_close(collected(), (each[0] + each[1]) / 2)
    set_progress(layers, 1.0)
    f, p = torch.zeros(2, 8, dtype=torch.float64)
    for layer, rows in zip(layers, x, strict=True):
        routing = decide(layer, rows).routing
        f = f + routing.routing_map().double().mean(0) / 2
        p = p + routing.probs.mean(0) / 2
    torch.testing.assert_close(collected(), 0.01 * 8 * f @ p)


def test_state_is_saved_and_frozen_and_options_are_checked() -> None:
    layers = group()
    set_progress(layers, 0.5)
    others = group()
    others.load_state_dict(layers.state_dict())
    assert [int(layer.router.widening.count) for layer in moe_layers(others.eval())] == [6, 6]
    for wrong, words in (
        ({"group": 0}, "group=0 must be at least 1"),
        ({"start": 0.5, "until": 0.5}, r"0 <= start < until <= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Lending(**wrong)
    with pytest.raises(ValueError, match="group=3 layers must own equal blocks of num_experts=8"):
        layer_of("rexmoe", router="lending:group=3", num_experts=8)
    with pytest.raises(ValueError, match="each of at least top_k=3"):
        layer_of("rexmoe", top_k=3)
