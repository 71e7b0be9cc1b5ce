"""MoE++: choices that compute nothing, a balance that lets them, and gating residuals."""

from __future__ import annotations

import warnings

import pytest
import torch
from decisions import decide, from_host, layer_of
from torch import Tensor, nn
from toys import H, Toy, train

from etr.methods import METHODS
from etr.moe import Collector, MoE, MoEConfig, RoutingContext
from etr.moe.context import Replay
from etr.moe.notice import EtrWarning
from etr.moe.reference import feed_forward


def two_layers(**options: object) -> list[MoE]:
    """Both in float64, with residuals that are not 0."""
    config = layer_of("moe_pp", top_k=2, **options).config
    layers = [MoE(config, place).double() for place in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer.router.residual.normal_()
    return layers


def run(layers: list[MoE], x: Tensor) -> Tensor:
    context = RoutingContext(logits={})
    for layer in layers:
        x = x + layer(x, context).hidden_states
    return x


def test_against_plain_loops() -> None:
    """Two layers, one token and one choice at a time; values and gradients of everything."""
    layers, x = two_layers(), torch.randn(6, 16, dtype=torch.float64)
    found, h, before = run(layers, x), list(x), [None] * 6
    for layer in layers:
        params, bank, router = layer.experts.params(x.dtype), layer.experts, layer.router
        for t, token in enumerate(h):
            logits = router.weight @ token
            if before[t] is not None:
                logits = logits + router.residual @ before[t]
            gates = logits.exp() / logits.exp().sum()
            total = token
            for e in sorted(range(8), key=lambda e: -float(gates[e].detach()))[:2]:
                if e < 4:
                    value = feed_forward(token, params, e)
                elif e == 4:
                    value = token * 0
                elif e == 5:
                    value = token
                else:
                    share = (bank.mixes[e - 6] @ token).exp()
                    share = share / share.sum()
                    value = share[0] * token + share[1] * bank.constants[e - 6]
                total = total + gates[e] * value
            h[t], before[t] = total, logits
    want = torch.stack(h)
    torch.testing.assert_close(found, want)
    values = [p for layer in layers for p in layer.parameters()]
    probe = torch.randn_like(want)
    got = torch.autograd.grad((found * probe).sum(), values)
    right = torch.autograd.grad((want * probe).sum(), values, allow_unused=True)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other)


def test_a_constant_choice_is_a_mean_of_token_and_vector() -> None:
    """a = (.25, .75), x = (1, 2), v = (4, -2): (3.25, -1)."""
    layer = layer_of("moe_pp", hidden_size=2, num_experts=1, top_k=1).double()
    with torch.no_grad():
        layer.experts.constants[0] = torch.tensor([4.0, -2.0])
        layer.experts.mixes.zero_()
        layer.experts.mixes[0, 1, 0] = torch.tensor(3.0).log()
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    assert with_choice(layer, x, 3)[0].tolist() == pytest.approx([3.25, -1.0])
    torch.testing.assert_close(with_choice(layer, x, 2), x)
    assert not with_choice(layer, x, 1).any()


def with_choice(layer: MoE, x: Tensor, choice: int) -> Tensor:
    """Output over weight where the one token makes this choice."""
    replay = {0: Replay(expert=torch.tensor([[choice]]))}
    context = RoutingContext(replay=replay)
    weight = decide(layer, x, context).selection.combine_weight
    return layer(x, context).hidden_states / weight


def test_the_worked_balance() -> None:
    """P = (.5, .2, .2, .1), (.1, .3, .2, .4), choices 0 1 and 1 3, two experts: .49375 N / K."""
    options = {"experts": "zero_computation:constant=0", "num_experts": 2, "top_k": 2}
    layer = layer_of("moe_pp", losses="uneven_balance:weight=1", **options).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    x = torch.zeros(2, 16, dtype=torch.float64)
    x[:, :4] = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.3, 0.2, 0.4]]).log()
    assert decide(layer, x).routing.expert.tolist() == [0, 1, 3, 1]
    assert float(layer(x).losses["uneven_balance"].detach()) == pytest.approx(0.49375 * 4 / 2)


def test_weights_are_not_renormalised() -> None:
    """Gates .3 and .2, the second of the zero choice: (.3, .2)."""
    layer = layer_of("moe_pp", num_experts=2, top_k=2, experts="zero_computation:constant=0")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
    x = torch.zeros(1, 16)
    x[0, :4] = torch.tensor([0.3, 0.19, 0.2, 0.19]).log()
    view = decide(layer, x)
    assert view.routing.expert.tolist() == [0, 2]
    ratio = view.selection.combine_weight / view.routing.probs[0, [0, 2]]
    assert ratio.tolist() == pytest.approx([1.0, 1.0])


def test_without_free_choices_and_residuals_it_is_softmax_top_k() -> None:
    empty = "zero_computation:zero=0,copy=0,constant=0"
    layer = layer_of("moe_pp", experts=empty, top_k=2, losses="balance")
    plain = layer_of("token_choice", top_k=2, capacity="none", normalize="none", losses="balance")
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(32, 16)
    found, want = layer(x, RoutingContext(logits={0: x[:, :4]})), plain(x)
    assert torch.equal(found.hidden_states, want.hidden_states)
    even = layer_of("moe_pp", experts=empty, top_k=2, losses="uneven_balance:weight=0.01")
    even.load_state_dict(layer.state_dict())
    torch.testing.assert_close(even(x).losses["uneven_balance"], want.losses["aux"])


def test_only_experts_count_operations() -> None:
    layer = layer_of("moe_pp")
    per_pair = 2 * 3 * 16 * 8
    counts = torch.tensor([3, 0, 1, 2, 100, 100, 100, 100])
    assert float(layer.bank.flops(counts)) == 6 * per_pair


def test_the_layer_before_is_read_and_nothing_else() -> None:
    first, second = two_layers()
    x, context = torch.randn(5, 16, dtype=torch.float64), RoutingContext(logits={})
    first(x, context)
    assert list(context.logits or {}) == [0]
    with_it = decide(second, x, context).routing.logits
    with pytest.warns(EtrWarning, match=r"MoE layer 1 has a router .* RoutingContext\(logits={}\)"):
        alone = decide(second, x).routing.logits
    want = alone + context.logits[0] @ second.router.residual.T
    torch.testing.assert_close(with_it, want)
    with pytest.raises(ValueError, match=r"has 8 experts for 4 tokens, .* are \[5, 8\]"):
        second(x[:4], context)


def test_a_first_layer_says_nothing_and_no_forward_waits_for_the_host() -> None:
    layer = layer_of("moe_pp")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EtrWarning)
        layer(torch.randn(5, 16))
    assert from_host(layer, torch.randn(5, 16)) == 0


def test_a_residual_passes_checkpointing_and_no_later_token_leaks() -> None:
    layers, x = two_layers(), torch.randn(12, 16, dtype=torch.float64)
    grads = []
    for recompute in (False, True):
        context, h = RoutingContext(logits={}), x.clone().requires_grad_()
        y = h
        for layer in layers:

            def call(y: Tensor, layer: MoE = layer, context: RoutingContext = context) -> Tensor:
                return layer(y, context).hidden_states

            if recompute:
                y = y + torch.utils.checkpoint.checkpoint(call, y, use_reentrant=False)
            else:
                y = y + call(y)
        values = [h, *(p for layer in layers for p in layer.parameters())]
        grads.append(torch.autograd.grad(y.square().sum(), values))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    later = x.clone()
    later[6:] *= -2
    torch.testing.assert_close(run(layers, later)[:6], run(layers, x)[:6], rtol=1e-12, atol=1e-13)


def target(toy: Toy, x: Tensor, cluster: Tensor) -> Tensor:
    """By thirds of the clusters: y = x, x + v_c / 2, x + tanh(2 A_c x)."""
    kind = (cluster % 3)[:, None]
    maps = torch.tanh(2 * torch.einsum("td,tdh->th", x, toy.maps[cluster]))
    return x + torch.where(kind == 2, maps, torch.where(kind == 1, toy.extra[cluster] / 2, 0.0))


class Two(nn.Module):
    """Two residual layers, each after a LayerNorm; the second reads the first one's logits."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": H, "intermediate_size": 16, "num_experts": 8, "activation": "gelu"}
        # The mean of two layers' losses counts as their sum at the default weight of 0.01.
        options = {**METHODS["moe_pp"].config_options(), "losses": "uneven_balance:weight=0.02"}
        config = MoEConfig(**sizes, top_k=2, **options)
        self.layers = nn.ModuleList(MoE(config, place) for place in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(H) for _ in range(2))
        self.counts: list[Tensor] = []
        with torch.no_grad():
            for layer in self.layers:
                layer.router.weight.mul_(3**-0.5)  # as linear layers of torch start
                layer.experts.constants.mul_(0.4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        context, self.counts = RoutingContext(logits={}), []
        with Collector(self) as collector:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                h = norm(x)
                x = x + layer(h, context).hidden_states
                self.counts.append(h.detach())
        return x, collector.loss()


@pytest.mark.measured
@pytest.mark.criterion
def test_hard_tokens_take_more() -> None:
    """Where a third of the tokens must stay as they are, a third take a vector and a third a map,
    tokens with a map take at least 0.4 experts more of top_k = 2 than those that stay, and all of
    them 1.5 or fewer, as means of 3 seeds."""
    found = torch.zeros(3, 4)
    for seed in range(3):
        torch.manual_seed(seed)
        model, toy = Two(), Toy(seed, clusters=18, target=target)
        train(model, toy, 800)
        x, _, cluster = toy.draw(8192, torch.Generator().manual_seed(999))
        with torch.no_grad():
            model(x)
        context, taken = RoutingContext(logits={}), torch.zeros(8192)
        for layer, h in zip(model.layers, model.counts, strict=True):
            taken += decide(layer, h, context).routing.routing_map()[:, :8].sum(1) / 2
        thirds = [taken[cluster % 3 == kind].mean() for kind in range(3)]
        found[seed] = torch.stack((*thirds, taken.mean()))
    easy, _, hard, mean = found.mean(0).tolist()
    assert hard >= easy + 0.4
    assert mean <= 1.5


@pytest.mark.parametrize(("num_tokens", "expected"), [(100, (9, 11)), (400, (33, 44)), (1, (1, 1))])
def test_choices_without_weights_have_more_room(num_tokens: int, expected: tuple[int, int]) -> None:
    """Of 8 experts and 4 others, 100 tokens and one choice: 8.25 and 11 tokens; in whole ones."""
    layer = layer_of("moe_pp", num_experts=8, top_k=1, capacity="factor:nulls=4,free=0.75")
    view = decide(layer, torch.randn(num_tokens, 16))
    limit = layer.capacity.limit(view.routing, torch.empty(0), torch.empty(0))
    assert limit.capacity.tolist() == [expected[0]] * 8 + [expected[1]] * 4
    assert bool((view.selection.num_tokens_per_expert <= limit.capacity).all())
    asked = view.routing.num_choices_per_expert()
    assert torch.equal(view.selection.num_tokens_per_expert, torch.minimum(asked, limit.capacity))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nulls=12", "nulls=12 of capacity 'factor' must be fewer than the layer's 12 choices"),
        ("nulls=-1", "nulls=-1"),
        ("free=0", "free=0"),
        ("capacity_factor=-1", "capacity_factor=-1"),
    ],
)
def test_room_that_cannot_be_is_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of("moe_pp", num_experts=8, top_k=1, capacity=f"factor:{options}")
