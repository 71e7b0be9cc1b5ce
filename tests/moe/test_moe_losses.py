"""Losses against values worked out by hand, and what each mode of the balance loss counts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.moe import (
    Collector,
    ExpertPlacement,
    LossConfig,
    MoE,
    MoEConfig,
    RoutingContext,
    after_step,
    reference,
)
from etr.moe.losses import balance_loss, locality_loss, locality_target, z_loss
from etr.moe.routing import Routing
from etr.moe.select import token_pairs

H, E = 16, 4


def routing_of(probs: Tensor, expert: list[int], mask: list[bool] | None = None) -> Routing:
    valid = torch.tensor(mask or [True] * len(expert))
    token, flat = token_pairs(torch.tensor(expert)[:, None], valid, probs.shape[1])
    return Routing(
        token=token,
        expert=flat,
        score=None,
        gate=torch.ones(len(expert)),
        valid_mask=valid,
        scores=None,
        logits=probs.log(),
        probs=probs,
        num_experts=probs.shape[1],
        top_k=1,
    )


PROBS = torch.tensor([[0.5, 0.5], [0.1, 0.9], [0.3, 0.7]], dtype=torch.float64)


def test_balance_loss_by_hand() -> None:
    routing = routing_of(PROBS, [0, 1, 1])
    # f = (1/3, 2/3), P = (0.3, 0.7): 2 * (0.1 + 1.4 / 3)
    load = routing.num_choices_per_expert()
    assert float(balance_loss(routing, load)) == pytest.approx(2 * (0.3 / 3 + 1.4 / 3))
    assert float(reference.balance_loss(routing)) == pytest.approx(2 * (0.3 / 3 + 1.4 / 3))
    masked = routing_of(PROBS, [0, 1, 1], [True, False, True])
    # f = (1/2, 1/2), P = (0.4, 0.6)
    found = balance_loss(masked, masked.num_choices_per_expert())
    assert float(found) == pytest.approx(1.0)


@pytest.mark.parametrize("num_experts", [2, 8])
def test_balance_loss_ranges_from_one_at_balance_to_e_at_collapse(num_experts: int) -> None:
    even = torch.full((num_experts, num_experts), 1 / num_experts)
    routing = routing_of(even, list(range(num_experts)))
    assert float(balance_loss(routing, routing.num_choices_per_expert())) == pytest.approx(1.0)
    one = torch.zeros(6, num_experts)
    one[:, 0] = 1
    routing = routing_of(one, [0] * 6)
    found = balance_loss(routing, routing.num_choices_per_expert())
    assert float(found) == pytest.approx(num_experts)


def test_the_load_has_no_gradient_and_the_probabilities_do() -> None:
    probs = PROBS.clone().requires_grad_()
    load = torch.tensor([1.0, 2.0], requires_grad=True)
    balance_loss(routing_of(probs, [0, 1, 1]), load).backward()
    assert load.grad is None
    # d/dp = E * f_e / T for every valid token
    want = torch.tensor([[2 / 9, 4 / 9]] * 3, dtype=torch.float64)
    assert probs.grad is not None
    torch.testing.assert_close(probs.grad, want)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 2.0], [9.0, 9.0]], dtype=torch.float64)
    routing = routing_of(logits.exp(), [0, 0, 0], [True, True, False])
    want = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    assert float(z_loss(routing)) == pytest.approx(want)


PLACEMENT = ExpertPlacement(rank_of_expert=(0, 1, 1, 1), node_of_rank=(0, 1))


def test_locality_loss_by_hand() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.2, 0.1, 0.4, 0.3]], dtype=torch.float64)
    routing = routing_of(probs, [0, 0])
    mean, eps = [0.3, 0.2, 0.3, 0.2], 0.1
    for rank, target in (
        (0, [(1 - eps) + eps / 4, eps / 4, eps / 4, eps / 4]),
        (1, [eps / 4] + [(1 - eps) / 3 + eps / 4] * 3),
    ):
        want = sum(c * math.log(c / d) for c, d in zip(mean, target, strict=True))
        found = locality_loss(routing, PLACEMENT, rank)
        assert float(found) == pytest.approx(want)
        assert locality_target(PLACEMENT, rank, eps).tolist() == pytest.approx(target)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rank", [0, 1])
def test_locality_is_a_divergence(epsilon: float, rank: int) -> None:
    target = locality_target(PLACEMENT, rank, epsilon)
    assert float(target.sum()) == pytest.approx(1)
    assert bool((target > 0).all())
    for _ in range(20):
        probs = (3 * torch.randn(5, 4, dtype=torch.float64)).softmax(-1)
        assert float(locality_loss(routing_of(probs, [0] * 5), PLACEMENT, rank, epsilon)) >= 0
    same = routing_of(target.expand(5, 4), [0] * 5)
    assert float(locality_loss(same, PLACEMENT, rank, epsilon)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_one_process_can_stand_for_several_nodes(nodes: int, masked: bool) -> None:
    """The mean of what every node's ranks would compute on their block of tokens."""
    x = torch.randn(24, 16, dtype=torch.float64)
    valid = torch.rand(24) > 0.3 if masked else torch.ones(24, dtype=torch.bool)
    placement = ExpertPlacement.contiguous(8, nodes, nodes)
    config = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=8,
        router="token_choice",
        losses=f"locality:weight=1,nodes={nodes}",
    )
    layer = MoE(config).double()
    of_rank = MoE(dataclasses.replace(config, losses="locality:weight=1")).double()
    of_rank.load_state_dict(layer.state_dict())
    of_rank.router = layer.router
    found = layer(x, RoutingContext(valid_mask=valid)).losses["locality"]
    parts = []
    for rank in range(nodes):
        own = slice(rank * 24 // nodes, (rank + 1) * 24 // nodes)
        context = RoutingContext(valid_mask=valid[own], placement=placement, rank=rank)
        parts.append(of_rank(x[own], context).losses["locality"])
    torch.testing.assert_close(found, torch.stack(parts).mean())
    gradients = [
        torch.autograd.grad(loss, layer.router.weight)[0]
        for loss in (found, torch.stack(parts).mean())
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("nodes", [3, 5])
def test_nodes_that_do_not_divide_are_refused(nodes: int) -> None:
    config = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=8,
        router="token_choice",
        losses=f"locality:weight=1,nodes={nodes}",
    )
    with pytest.raises(ValueError, match=f"nodes={nodes} of loss 'locality' must divide"):
        MoE(config)(torch.randn(24, 16))
    with pytest.raises(ValueError, match="nodes=0 of loss 'locality'"):
        MoE(dataclasses.replace(config, losses="locality:nodes=0"))


def test_locality_of_certain_tokens_is_finite() -> None:
    probs = torch.zeros(3, 4, dtype=torch.float64)
    probs[:, 0] = 1.0
    probs.requires_grad_()
    loss = locality_loss(routing_of(probs, [0] * 3), PLACEMENT, 1)
    assert float(loss.detach()) == pytest.approx(math.log(1 / 0.025))
    loss.backward()
    assert probs.grad is not None
    assert torch.isfinite(probs.grad).all()


def test_a_node_without_experts_wants_an_even_spread() -> None:
    placement = ExpertPlacement(rank_of_expert=(0, 0, 0, 0), node_of_rank=(0, 1))
    assert locality_target(placement, 1, 0.1).tolist() == [0.25] * 4


def test_losses_without_what_they_need_name_it() -> None:
    routing = routing_of(PROBS, [0, 1, 1])
    bare = Routing(**{**vars(routing), "probs": None, "logits": None})
    with pytest.raises(ValueError, match="probabilities"):
        balance_loss(bare, torch.ones(2))
    with pytest.raises(ValueError, match="logits"):
        z_loss(bare)
    with pytest.raises(ValueError, match="probabilities"):
        locality_loss(bare, PLACEMENT, 0)


def layer_of(router: str = "token_choice", **losses: Any) -> MoE:
    torch.manual_seed(11)
    config = MoEConfig(
        hidden_size=H,
        intermediate_size=4,
        num_experts=E,
        router=router,
        losses=LossConfig(**losses),
        capacity="none",
    )
    return MoE(config).double()


def tokens(num_tokens: int, lean: int = 0) -> Tensor:
    x = torch.randn(num_tokens, H, dtype=torch.float64)
    x[:, lean * 4 : lean * 4 + 4] += 1
    return x


def by_hand(layer: MoE, x: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    """alpha * E * sum_e f_e P_e with a given load, and its gradient for the router's weight."""
    weight = layer.router.get_parameter("weight").detach().requires_grad_()
    probs = (x @ weight.T).softmax(-1)
    share = load.double() / load.sum()
    loss = 0.01 * E * (share * probs.mean(0)).sum()
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


def choices(layer: MoE, x: Tensor) -> Tensor:
    weight = layer.router.get_parameter("weight").detach()
    return torch.bincount((x @ weight.T).argmax(-1), minlength=E)


@pytest.mark.parametrize("mode", ["micro", "ranks", "running", "previous"])
def test_what_each_mode_counts_as_load(mode: str) -> None:
    layer = layer_of(aux_mode=mode)
    past, first, second = tokens(30, 3), tokens(10, 0), tokens(20, 1)
    with Collector(layer):
        layer(past)
    after_step(layer)
    with Collector(layer):
        layer(first)
    with Collector(layer) as collector:
        found = layer(second).losses["aux"]
    loads = {
        "micro": choices(layer, second),
        "ranks": choices(layer, second),
        "running": choices(layer, first) + choices(layer, second),
        "previous": choices(layer, past),
    }
    want, gradient = by_hand(layer, second, loads[mode])
    torch.testing.assert_close(found.detach(), want)
    got = torch.autograd.grad(found, layer.router.get_parameter("weight"))[0]
    torch.testing.assert_close(got, gradient)
    torch.testing.assert_close(collector.loss(), found)
    for other, load in loads.items():
        if not torch.equal(load, loads[mode]):
            assert not torch.allclose(by_hand(layer, second, load)[1], got), other


def test_running_begins_afresh_each_step() -> None:
    layer, x = layer_of(aux_mode="running"), tokens(20)
    with Collector(layer):
        layer(tokens(20, 2))
    after_step(layer)
    with Collector(layer):
        found = layer(x).losses["aux"]
    torch.testing.assert_close(found.detach(), by_hand(layer, x, choices(layer, x))[0])


@pytest.mark.parametrize("steps_before", [0, 1])
def test_previous_is_invariant_to_accumulation(steps_before: int) -> None:
    """Value and gradient: two micro-batches of half weight equal one batch."""
    found = []
    data, past = tokens(24), tokens(30, 3)
    for parts in (1, 2):
        layer = layer_of(aux_mode="previous")
        for _ in range(steps_before):
            with Collector(layer):
                layer(past)
            after_step(layer)
        total = torch.zeros((), dtype=torch.float64)
        for chunk in data.chunk(parts):
            with Collector(layer) as collector:
                layer(chunk)
            loss = collector.loss() / parts
            assert isinstance(loss, Tensor)
            loss.backward()
            total += loss.detach()
        found.append((total, layer.router.get_parameter("weight").grad))
    torch.testing.assert_close(found[0], found[1])


def test_other_modes_are_not() -> None:
    """The test above can fail: with the micro-batch's own load the gradient differs."""
    data, gradients = torch.cat([tokens(12, 0), tokens(12, 1)]), []
    for parts in (1, 2):
        layer = layer_of(aux_mode="micro")
        for chunk in data.chunk(parts):
            (layer(chunk).losses["aux"] / parts).backward()
        gradients.append(layer.router.get_parameter("weight").grad)
    assert not torch.allclose(gradients[0], gradients[1])  # type: ignore[arg-type]


def test_balancing_lowers_the_imbalance() -> None:
    layer, x = layer_of(aux_alpha=1.0), tokens(400)
    x = x + 2 * layer.router.get_parameter("weight").detach()[2]
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
    before = layer(x).losses["aux"].item()
    for _ in range(100):
        optimizer.zero_grad()
        layer(x).losses["aux"].backward()
        optimizer.step()
    assert layer(x).losses["aux"].item() < before - 0.05
    assert layer(x).losses["aux"].item() == pytest.approx(1.0, abs=0.05)


def test_losses_are_scaled_and_left_out_at_weight_zero() -> None:
    x, context = tokens(20), RoutingContext(placement=PLACEMENT)
    one = layer_of(aux_alpha=1.0, z_beta=1.0, locality_mu=1.0)(x, context).losses
    third = layer_of(aux_alpha=0.3, z_beta=0.5, locality_mu=0.25)(x, context).losses
    for name, weight in (("aux", 0.3), ("z", 0.5), ("locality", 0.25)):
        torch.testing.assert_close(third[name], weight * one[name])
    assert layer_of(aux_alpha=0.0, locality_mu=0.0)(x, context).losses == {}
    assert layer_of().eval()(x).losses == {}


@pytest.mark.parametrize(("num_nodes", "present"), [(1, False), (2, True)])
def test_locality_is_on_by_default_with_more_than_one_node(num_nodes: int, present: bool) -> None:
    placement = ExpertPlacement.contiguous(E, 2, num_nodes)
    x, layer = tokens(9), layer_of()
    losses = layer(x, RoutingContext(placement=placement)).losses
    assert ("locality" in losses) == present
    if present:
        routing, _ = layer.route(x, RoutingContext())
        want = 0.01 * locality_loss(routing, placement, 0)
        torch.testing.assert_close(losses["locality"], want)


def test_locality_without_a_placement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"locality loss \(weight=0\.5; .* needs .*placement"):
        layer_of(locality_mu=0.5)(tokens(3))


def test_fixed_frames_pass_the_balance_gradient_into_the_features() -> None:
    layer, x = layer_of("etr_paper"), tokens(20).requires_grad_()
    gradient = torch.autograd.grad(layer(x).losses["aux"], x)[0]
    assert gradient.any()
