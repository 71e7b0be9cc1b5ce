"""Watching layers: every observer sees input, routing and selection, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

import etr
from etr.moe.watch import LayerView, expert_neurons, watch

CONFIG = etr.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2)


def two_layers() -> torch.nn.Sequential:
    class Block(torch.nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.moe = etr.MoE(CONFIG, index)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.moe(x).hidden_states

    return torch.nn.Sequential(Block(0), Block(1))


def test_every_layer_is_seen_with_what_it_decided() -> None:
    model, x = two_layers(), torch.randn(2, 5, 16)
    views: dict[int, LayerView] = {}
    with watch(model, views.__setitem__):
        model(x)
    assert list(views) == [0, 1]
    assert views[0].x.shape == (10, 16)
    assert torch.equal(views[0].x, x.view(10, 16))
    for place, layer in enumerate(etr.moe_layers(model)):
        view = views[place]
        assert view.layer is layer
        assert view.routing.expert.shape == view.selection.kept.shape == (20,)
        assert not view.x.requires_grad


def test_watchers_nest_and_leave_no_trace() -> None:
    model, x = two_layers(), torch.randn(3, 16)
    outer, inner = list[int](), list[int]()

    def see(place: int, view: LayerView) -> None:
        inner.append(place)

    with watch(model, lambda place, view: outer.append(place)):
        with watch(model, see), watch(model, see):
            model(x)
        model(x)
    model(x)
    assert outer == [0, 1, 0, 1]
    assert inner == [0, 0, 1, 1]


def test_watchers_go_when_a_forward_fails() -> None:
    model = two_layers()
    with pytest.raises(ValueError, match="hidden_size"), watch(model, lambda place, view: None):
        model(torch.randn(3, 15))
    assert all(not layer.watchers for layer in etr.moe_layers(model))


def test_who_needs_outputs_sees_layers_after_their_experts_ran() -> None:
    config = etr.MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=4,
        top_k=2,
        capacity="factor:capacity_factor=0.7",
        num_shared_experts=1,
        expert_bias=True,
    )
    layer, x = etr.MoE(config), torch.randn(40, 16)
    torch.nn.init.normal_(layer.experts.down_proj_bias)
    before, after, rows = list[LayerView](), list[LayerView](), list[LayerView]()
    with (
        watch(layer, lambda place, view: before.append(view)),
        watch(layer, lambda place, view: after.append(view), ("outputs",)),
        watch(layer, lambda place, view: rows.append(view), ("outputs", "rows")),
    ):
        y = layer(x).hidden_states
    assert (before[0].output, before[0].rows, after[0].rows) == (None, None, None)
    assert torch.equal(after[0].output, y)
    assert not after[0].output.requires_grad
    view = rows[0]
    kept = view.selection.kept
    assert not kept.all()  # some were dropped
    assert (view.rows[~kept] == 0).all()
    weighed = view.rows * view.selection.combine_weight[:, None]
    routed = torch.zeros_like(y).index_add(0, view.routing.token, weighed)
    shared = layer.shared_experts
    params = shared.params(x.dtype)
    gate, up = (x @ params.up[0].T).chunk(2, -1)
    wanted = routed + (torch.nn.functional.silu(gate) * up) @ params.down[0].T
    torch.testing.assert_close(wanted, y)
    assert not layer.watchers
    assert not layer.output_watchers


def test_what_cannot_be_seen_is_refused() -> None:
    refused = pytest.raises(
        ValueError, match="needs='weights' is unknown; choose of outputs, rows, gradients"
    )
    with refused, watch(two_layers(), lambda place, view: None, ("weights",)):
        pass


def test_gradients_are_seen_in_the_backward_pass() -> None:
    """Of the loss by the layer's output; without one there is nothing to see."""
    model, x = two_layers(), torch.randn(2, 5, 16)
    views: dict[int, LayerView] = {}
    outputs: list[torch.Tensor] = []
    for block in model:
        block.moe.register_forward_hook(lambda m, given, out: outputs.append(out.hidden_states))
    with watch(model, views.__setitem__, ["gradients"]):
        loss = model(x).square().sum()
        for output in outputs:
            output.retain_grad()
        assert not views
        loss.backward()
        with torch.no_grad(), pytest.raises(ValueError, match="has no backward pass"):
            model(x)
    assert sorted(views) == [0, 1]
    for place, view in views.items():
        assert view.gradient is not None
        assert view.live is None
        torch.testing.assert_close(view.gradient.view(2, 5, 16), outputs[place].grad)


def test_neurons_times_the_down_projection_are_the_rows() -> None:
    model, x = two_layers(), torch.randn(2, 5, 16)
    views: dict[int, LayerView] = {}
    with watch(model, views.__setitem__, ["rows"]):
        model(x)
    for view in views.values():
        found = torch.zeros_like(view.rows)
        for pair, active, down in expert_neurons(view):
            assert active.shape == (len(pair), 8)
            found[pair] = active @ down.T
        torch.testing.assert_close(found, view.rows)
