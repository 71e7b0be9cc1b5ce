"""UniPool: one bank for all layers, a balance of the whole, and scores of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor, nn

from etr.moe import Collector, MoE, RoutingContext
from etr.moe.layers import tie_experts
from etr.moe.reference import feed_forward
from etr.moe.stats import max_violation


class Layers(nn.Module):
    """Layers of one pool, each with tokens of its own: [L, T, H] to the collected loss."""

    def __init__(self, count: int, **options: object) -> None:
        super().__init__()
        config = layer_of("unipool", losses="pool_balance:weight=1", **options).config
        self.layers = nn.ModuleList(MoE(config, place) for place in range(count))
        tie_experts(list(self.layers))

    def forward(
        self, x: Tensor, recompute: bool = False, order: Sequence[int] | None = None
    ) -> Tensor:
        def call(x: Tensor, layer: MoE) -> Tensor:
            return layer(x).hidden_states

        with Collector(self) as collector:
            total = x.new_zeros(())
            for place in range(len(x)) if order is None else order:
                rows, layer = x[place], self.layers[place]
                if recompute:
                    y = torch.utils.checkpoint.checkpoint(call, rows, layer, use_reentrant=False)
                else:
                    y = call(rows, layer)
                total = total + y.square().mean()
        loss = collector.loss()
        assert isinstance(loss, Tensor)
        return loss + 0 * total


def test_worked_scores() -> None:
    """z = (3, -4, 0, 12): .2308, 0, 0, .9231; the same for 10 z; nothing positive weighs 0."""
    layer = layer_of("unipool", top_k=2).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    z = torch.zeros(4, 16, dtype=torch.float64)
    z[0, :4] = torch.tensor([3.0, -4.0, 0.0, 12.0])
    z[1], z[2] = 10 * z[0], -z[0].abs()
    view = decide(layer, z.requires_grad_())
    assert view.routing.scores[0].relu().tolist() == pytest.approx([3 / 13, 0, 0, 12 / 13])
    torch.testing.assert_close(view.routing.scores[1], view.routing.scores[0])
    assert view.routing.expert.view(4, 2).tolist() == [[3, 0], [3, 0], [2, 0], [0, 1]]
    weights = view.selection.combine_weight.view(4, 2)
    scale = layer.router.scale
    torch.testing.assert_close(weights[0], scale * torch.tensor([12 / 13, 3 / 13]).double())
    assert not weights[2:].any()
    (grad,) = torch.autograd.grad(layer(z).hidden_states.sum(), z)
    assert torch.isfinite(grad).all()
    assert view.routing.probs.sum(-1).tolist() == pytest.approx([1, 1, 1, 1])


def test_against_plain_loops() -> None:
    """One token and one choice at a time; values, gradients, and weights that sum to 1 at first."""
    layer, x = layer_of("unipool", top_k=2).double(), torch.randn(7, 16, dtype=torch.float64)
    mask, params, rows = torch.arange(7) != 3, layer.experts.params(x.dtype), []
    for t, token in enumerate(x):
        z = layer.router.weight @ token
        s = layer.router.scale * (z / z.square().sum().sqrt()).clamp_min(0)
        best = sorted(range(4), key=lambda e: -float(s[e].detach()))[:2]
        total = sum(s[e] * feed_forward(token, params, e) for e in best)
        rows.append(total * int(mask[t]))
    found, want = layer(x, RoutingContext(valid_mask=mask)).hidden_states, torch.stack(rows)
    torch.testing.assert_close(found, want)
    values, probe = list(layer.parameters()), torch.randn_like(want)
    for got, right in zip(
        torch.autograd.grad((found * probe).sum(), values),
        torch.autograd.grad((want * probe).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right)
    z = torch.randn(4096, 16, dtype=torch.float64)
    sums = decide(layer, z).selection.combine_weight.view(-1, 2).sum(-1)
    assert float(sums.mean().detach()) == pytest.approx(1, abs=0.02)


def of_pool(model: Layers, x: Tensor) -> Tensor:
    """M times the sum over experts of the layers' mean share and mean probability."""
    shares, means = [], []
    for rows, layer in zip(x, model.layers, strict=True):
        routing = decide(layer, rows).routing
        shares.append(routing.routing_map().double().mean(0) / layer.config.top_k)
        means.append(routing.probs.mean(0))
    f, p = torch.stack(shares).mean(0), torch.stack(means).mean(0)
    return len(f) * f @ p


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_layers_losses_are_that_of_the_pool(recompute: bool, order: tuple[int, ...]) -> None:
    """Value and gradient, in whatever order they run, also where activations are computed again in
    the backward pass."""
    model, x = Layers(3, top_k=2).double(), torch.randn(3, 24, 16, dtype=torch.float64)
    found, want = model(x, recompute, order), of_pool(model, x)
    torch.testing.assert_close(found, want)
    values = [layer.router.weight for layer in model.layers]
    for got, right in zip(
        torch.autograd.grad(found, values), torch.autograd.grad(want, values), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_one_layer_has_the_balance_loss() -> None:
    x = torch.randn(32, 16, dtype=torch.float64)
    layer = layer_of("unipool", losses="pool_balance:weight=1,balance:weight=1").double()
    losses = learn(layer, x)
    torch.testing.assert_close(losses["pool_balance"], losses["aux"])
    alone = layer(x).losses  # no collector at all
    torch.testing.assert_close(alone["pool_balance"], losses["aux"])


def test_layers_that_share_nothing_are_no_pool() -> None:
    model, x = Layers(2, experts="uniform").double(), torch.randn(2, 24, 16, dtype=torch.float64)
    pairs = zip(x, model.layers, strict=True)
    own = [learn(layer, rows)["pool_balance"] for rows, layer in pairs]
    torch.testing.assert_close(model(x), (own[0] + own[1]) / 2)


@pytest.mark.measured
@pytest.mark.criterion
def test_the_pool_is_balanced_and_layers_are_not() -> None:
    """Four layers that each use an expert of their own have a pool loss of 1, where the loss of
    each is 4; on it alone, the MaxVio of a pool of 16 falls from over 2 to 0.1 or less while the
    layers' own stays at 1 or more."""
    model, x = Layers(4).double(), torch.ones(4, 8, 16, dtype=torch.float64)
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.router.weight.fill_(-1e-6)
            layer.router.weight[number] = 1.0
    assert float(model(x).detach()) == pytest.approx(1)
    for rows, layer in zip(x, model.layers, strict=True):
        assert float(learn(layer, rows)["pool_balance"].detach()) == pytest.approx(4)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 512, 16, generator=generator) + torch.randn(4, 1, 16, generator=generator)
    model = Layers(4, num_experts=16)
    for layer in model.layers:
        nn.init.normal_(layer.router.weight, std=0.5, generator=generator)

    def violations() -> tuple[float, float]:
        loads = torch.stack(
            [
                decide(layer, rows).routing.num_choices_per_expert()
                for rows, layer in zip(x, model.layers, strict=True)
            ]
        )
        return float(max_violation(loads.sum(0))), float(max_violation(loads).mean())

    assert violations()[0] > 2
    optimizer = torch.optim.Adam([layer.router.weight for layer in model.layers], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    pool, each = violations()
    assert pool <= 0.1
    assert each >= 1
