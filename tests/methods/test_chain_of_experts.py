"""Chain-of-Experts: the same experts in inner steps, each with a router of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from decisions import layer_of
from torch import Tensor

from etr.adapters.dense import DenseRouter
from etr.moe import Collector, MoE, MoEConfig, RoutingContext, after_step, moe_layers
from etr.moe.reference import feed_forward


def chain(steps: int = 2, **options: object) -> MoE:
    """A layer in float64 whose tokens take two of four experts a step."""
    return layer_of("chain_of_experts", inner_steps=steps, **options).double()


@pytest.mark.parametrize("shared", [0, 1])
def test_against_plain_loops(shared: int) -> None:
    """One token, one step and one expert at a time; values and gradients of everything."""
    layer, x = chain(3, num_shared_experts=shared), torch.randn(5, 16, dtype=torch.float64)
    params, rows = layer.experts.params(x.dtype), []
    for token in x:
        z = token
        for step in moe_layers(layer):
            gates = (step.router.weight @ z).softmax(0)
            best = sorted(range(4), key=lambda e: -float(gates[e].detach()))[:2]
            total = sum(gates[e] for e in best)
            added = sum(gates[e] / total * feed_forward(z, params, e) for e in best)
            if layer.shared_experts is not None:
                added = added + feed_forward(z, layer.shared_experts.params(x.dtype), 0)
            z = z + added
        rows.append(z - token)
    want, found = torch.stack(rows), layer(x).hidden_states
    torch.testing.assert_close(found, want)
    values, probe = list(layer.parameters()), torch.randn_like(want)
    for got, right in zip(
        torch.autograd.grad((found * probe).sum(), values),
        torch.autograd.grad((want * probe).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_the_worked_chain() -> None:
    """E0(x) = x, E1(x) = -2x; the first step takes E0, the second E1: x = 3 becomes 6, adds -9."""
    sizes = {"hidden_size": 1, "intermediate_size": 2, "num_experts": 2, "top_k": 1}
    config = MoEConfig(
        **sizes, router="token_choice", capacity="none", activation="gelu", inner_steps=2
    )
    layer = MoE(config).double()
    with torch.no_grad():  # gelu(x) - gelu(-x) = x
        layer.experts.up_proj.copy_(torch.tensor([[[1.0], [-1.0]]] * 2))
        layer.experts.down_proj.copy_(torch.tensor([[[1.0, -1.0]], [[-2.0, 2.0]]]))
        for step, sign in zip(moe_layers(layer), (1, -1), strict=True):
            step.router.weight.copy_(torch.tensor([[sign * 100.0], [sign * -100.0]]))
    y = layer(torch.tensor([[3.0]], dtype=torch.float64)).hidden_states
    assert y.item() == pytest.approx(-9.0)


@pytest.mark.criterion
def test_steps_cost_what_one_step_of_twice_the_experts_does() -> None:
    """With 1 step it is the plain layer bit for bit; 2 steps have the same expert parameters, and
    at half the experts a step the same operations, and each router has a gradient."""
    x = torch.randn(32, 16, dtype=torch.float64)
    plain = layer_of("token_choice", top_k=4, capacity="none").double()
    one, two = chain(1, top_k=4), chain(2)
    one.load_state_dict(plain.state_dict())
    found, want = one(x), plain(x)
    assert torch.equal(found.hidden_states, want.hidden_states)
    assert found.losses.keys() == want.losses.keys()
    assert all(torch.equal(found.losses[name], want.losses[name]) for name in want.losses)
    sizes = [sum(p.numel() for p in layer.experts.parameters()) for layer in (plain, two)]
    beside = [sum(p.numel() for p in layer.parameters()) for layer in (plain, two)]
    routers = sum(step.router.weight.numel() for step in moe_layers(two))
    assert sizes[0] == sizes[1] == beside[1] - routers
    output = two(x)
    costs = [
        float(layer.bank.flops(layer(x).stats["num_tokens_per_expert"])) for layer in (plain, two)
    ]
    assert costs[0] == costs[1] == 32 * 4 * 2 * 3 * 16 * 8
    output.hidden_states.square().sum().backward()
    for step in moe_layers(two):
        assert step.router.weight.grad is not None
        assert step.router.weight.grad.abs().max() > 1e-6


def test_experts_of_zeros_add_nothing_and_steps_are_layers() -> None:
    layer, x = chain(3), torch.randn(8, 16, dtype=torch.float64)
    assert [step.layer_index for step in moe_layers(layer)] == [0, 1, 2]
    assert [step.layer_index for step in moe_layers(MoE(layer.config, 2))] == [6, 7, 8]
    with torch.no_grad():
        layer.experts.down_proj.zero_()
    assert not layer(x).hidden_states.any()


def test_losses_are_means_over_steps_and_each_step_learns() -> None:
    layer, x = chain(2), torch.randn(16, 16, dtype=torch.float64)
    mask = torch.arange(16) < 12
    with Collector(layer) as collector:
        output = layer(x, RoutingContext(valid_mask=mask))
    first = layer.walk(x, RoutingContext(valid_mask=mask))
    second = layer.later[0](x + first.hidden_states, RoutingContext(valid_mask=mask))
    mean = (first.losses["aux"] + second.losses["aux"]) / 2
    torch.testing.assert_close(output.losses["aux"], mean)
    torch.testing.assert_close(collector.losses()["aux"], mean)
    assert len(collector.stats()) == 2
    found = after_step(layer)
    assert [int(stats["num_tokens_per_expert"].sum()) for stats in found] == [24, 24]
    assert [int(step.state.step) for step in moe_layers(layer)] == [1, 1]


def test_copied_resumed_recomputed_and_causal() -> None:
    layer, x = chain(2), torch.randn(12, 16, dtype=torch.float64)
    twin = chain(2)
    twin.load_state_dict(layer.state_dict())
    again = copy.deepcopy(layer)
    assert again.later[0].experts is again.experts is not layer.experts
    want = layer(x).hidden_states
    for one in (twin, again):
        assert torch.equal(one(x).hidden_states, want)
    later = x.clone()
    later[6:] *= -2
    torch.testing.assert_close(layer(later).hidden_states[:6], want[:6])

    def grads(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), list(layer.parameters()))

    def call(x: Tensor) -> Tensor:
        return layer(x).hidden_states

    recomputed = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False)
    for got, right in zip(grads(recomputed), grads(want), strict=True):
        torch.testing.assert_close(got, right)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="inner_steps=0 must be at least 1"):
        chain(0)
    with pytest.raises(ValueError, match="inner_steps: experts are made of it"):
        chain(2).reconfigure(inner_steps=1)
    with pytest.raises(ValueError, match="inner_steps=2 runs the experts again"):
        DenseRouter(chain(2).config)
