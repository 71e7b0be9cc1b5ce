"""Collecting one forward: what is counted, when, and how often."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from etr.moe import Collector, MoE, MoEConfig, RoutingContext, after_step, moe_layers
from etr.moe.losses import LossConfig

H = 16


class Model(nn.Module):
    """Two MoE layers around a residual."""

    def __init__(self) -> None:
        super().__init__()
        config = MoEConfig(
            hidden_size=H,
            intermediate_size=4,
            num_experts=4,
            router="token_choice",
            losses=LossConfig(z_beta=0.1),
        )
        self.layers = nn.ModuleList(MoE(config, index) for index in range(2))
        self.fail = False

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, context).hidden_states
            if self.fail:
                raise RuntimeError("halfway")
        return x


def seen(model: Model) -> list[int]:
    """Valid tokens waiting in each layer."""
    return [int(layer.pending.get("num_valid_tokens", 0)) for layer in moe_layers(model)]


def test_it_finds_layers_in_order() -> None:
    model = Model()
    assert moe_layers(model) == list(model.layers)
    assert moe_layers(model.layers[0]) == [model.layers[0]]


def test_it_finds_each_layer_once_however_it_is_held() -> None:
    """As `modules()` does, whose walk would take most of a decoding step of a large model."""
    first, second = (Model().layers[0] for _ in range(2))
    shared = nn.Sequential(second)
    held = nn.ModuleDict(
        {"deep": nn.Sequential(nn.Identity(), nn.ModuleList([first])), "a": shared}
    )
    held.register_module("absent", None)
    held["b"], held["again"] = nn.Sequential(shared, first), second
    held["b"].append(held["deep"])
    held["deep"].append(held["b"])  # a ring
    assert Collector(held).layers == [first, second]
    assert Collector(held).layers == [m for m in held.modules() if isinstance(m, MoE)]


def test_losses_are_means_over_layers() -> None:
    model, x = Model(), torch.randn(6, H)
    with Collector(model) as collector:
        model(x)
    first = model.layers[0](x)
    second = model.layers[1](x + first.hidden_states)
    for name in ("aux", "z"):
        want = (first.losses[name] + second.losses[name]) / 2
        torch.testing.assert_close(collector.losses()[name], want)
    torch.testing.assert_close(collector.loss(), sum(collector.losses().values()))
    assert [int(stats["num_valid_tokens"]) for stats in collector.stats()] == [6, 6]


def test_micro_batches_add_up_until_the_step() -> None:
    model = Model()
    for num_tokens in (6, 4):
        with Collector(model):
            model(torch.randn(num_tokens, H))
    assert seen(model) == [10, 10]
    assert int(model.layers[0].pending["num_forwards"]) == 2
    found = after_step(model)
    assert [int(stats["num_valid_tokens"]) for stats in found] == [10, 10]
    assert seen(model) == [0, 0]
    assert after_step(model) == [{}, {}]
    assert int(model.layers[0].state.step) == 1


def test_the_counters_wait_for_the_forward_to_return() -> None:
    model = Model()
    with Collector(model):
        model(torch.randn(6, H))
        assert seen(model) == [0, 0]
    assert seen(model) == [6, 6]


def test_a_closed_collector_ignores_recomputation() -> None:
    model, x = Model(), torch.randn(6, H)
    with Collector(model) as collector:
        model(x)
    loss = collector.loss()
    model(x)
    assert seen(model) == [6, 6]
    assert collector.loss() == loss
    collector.close()
    assert seen(model) == [6, 6]


def test_a_context_may_carry_it() -> None:
    model = Model()
    collector = Collector(model, ambient=False)
    model(torch.randn(6, H))
    assert collector.stats() == []
    model(torch.randn(6, H), RoutingContext(collector=collector))
    collector.close()
    assert seen(model) == [6, 6]
    assert isinstance(collector.loss(), Tensor)


def test_the_context_goes_before_the_ambient_one() -> None:
    model = Model()
    other = Collector(model, ambient=False)
    with Collector(model) as ambient:
        model(torch.randn(6, H), RoutingContext(collector=other))
    assert ambient.stats() == []
    assert len(other.stats()) == 2


def test_a_forward_that_raises_counts_nothing() -> None:
    model = Model()
    model.fail = True
    with pytest.raises(RuntimeError, match="halfway"), Collector(model):
        model(torch.randn(6, H))
    assert seen(model) == [0, 0]
    model.fail = False
    with Collector(model):
        model(torch.randn(6, H))
    assert seen(model) == [6, 6]


def test_inside_another_the_inner_one_collects_and_the_outer_goes_on() -> None:
    model = Model()
    with Collector(model) as outer:
        model(torch.randn(1, H))
        with Collector(model) as inner:
            model(torch.randn(2, H))
        model(torch.randn(4, H))
    assert [int(s["num_valid_tokens"]) for s in inner.stats()] == [2, 2]
    assert [int(s["num_valid_tokens"]) for s in outer.stats()] == [1, 1, 4, 4]
    assert seen(model) == [7, 7]


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_evaluation_counts_nothing() -> None:
    model = Model()
    with torch.no_grad(), Collector(model):
        model(torch.randn(6, H))
    assert seen(model) == [0, 0]
    model.eval()
    with Collector(model) as collector:
        model(torch.randn(6, H))
    assert seen(model) == [0, 0]
    assert collector.loss() == 0.0
    assert len(collector.stats()) == 2


def test_a_layer_that_did_not_run_learns_nothing() -> None:
    model = Model()
    with Collector(model):
        model.layers[1](torch.randn(6, H))
    assert [bool(stats) for stats in after_step(model)] == [False, True]
    assert [int(layer.state.step) for layer in model.layers] == [0, 1]


def test_counting_does_not_keep_the_graph() -> None:
    model = Model()
    with Collector(model):
        model(torch.randn(6, H))
    for layer in model.layers:
        assert not any(value.requires_grad for value in layer.pending.values())
