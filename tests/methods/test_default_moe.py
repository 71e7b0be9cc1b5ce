"""Default MoE: mean outputs stand in for experts that do not run."""

from __future__ import annotations

import io

import pytest
import torch
from decisions import layer_of, learn
from torch import Tensor
from toys import E, Net, Toy, train

from etr.moe import Collector, MoE, RoutingContext, after_step, moe_layers
from etr.moe.layers import tie_experts
from etr.moe.learner import Step
from etr.moe.reference import feed_forward


def with_means(**options: object) -> MoE:
    """A layer in float64 whose experts all have a mean output."""
    layer = layer_of("default_moe", **options).double()
    with torch.no_grad():
        layer.experts.default.mean.normal_()
        layer.experts.default.known.fill_(1)
    return layer


def plain(layer: MoE, x: Tensor, mask: Tensor) -> Tensor:
    """sum over S of pi_i E_i(x) + sum over the others of pi_i d_i, one token at a time."""
    params, rows = layer.experts.params(x.dtype), []
    for t, token in enumerate(x):
        logits = layer.router.weight @ token
        pi = logits.exp() / logits.exp().sum()
        best = sorted(range(len(pi)), key=lambda e: -float(pi[e].detach()))[: layer.config.top_k]
        total = torch.zeros_like(token)
        for e in range(len(pi)):
            mean = layer.experts.default.mean[e].to(x.dtype)
            value = feed_forward(token, params, e) if e in best else mean
            total = total + pi[e] * value
        rows.append(total * int(mask[t]))
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_against_plain_loops(top_k: int) -> None:
    layer, mask = with_means(top_k=top_k), torch.arange(7) != 3
    x = torch.randn(7, 16, dtype=torch.float64)
    found = layer(x, RoutingContext(valid_mask=mask)).hidden_states
    want = plain(layer, x, mask)
    torch.testing.assert_close(found, want)
    probe, values = torch.randn_like(want), list(layer.parameters())
    for got, right in zip(
        torch.autograd.grad((found * probe).sum(), values),
        torch.autograd.grad((want * probe).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right)
    torch.testing.assert_close(layer.eval()(x).hidden_states[mask], want[mask])


def test_worked_output_and_gradient() -> None:
    """pi = (.6, .3, .1), E_0 = (1, 0), d_1 = (0, 2), d_2 = (-1, 1): y = (.5, .7), and of their sum
    the logits have the gradient (-.12, .24, -.12), without means (.24, -.18, -.06)."""
    for means, want in ((True, [-0.12, 0.24, -0.12]), (False, [0.24, -0.18, -0.06])):
        layer = layer_of("default_moe", hidden_size=4, num_experts=3, expert_bias=True).double()
        with torch.no_grad():
            for value in layer.experts.parameters():
                value.zero_()
            layer.experts.down_proj_bias[0, 0] = 1.0
            layer.router.weight.copy_(torch.eye(3, 4))
            if means:
                rows = torch.tensor([[9.0, 9, 0, 0], [0, 2, 0, 0], [-1, 1, 0, 0]])
                layer.experts.default.mean.copy_(rows)
        x = torch.zeros(1, 4, dtype=torch.float64)
        x[0, :3] = torch.tensor([0.6, 0.3, 0.1]).log()
        y = layer(x).hidden_states
        if means:
            assert y[0].tolist() == pytest.approx([0.5, 0.7, 0, 0], abs=1e-6)
        y.sum().backward()
        assert layer.router.weight.grad is not None
        logits = (layer.router.weight.grad / x)[:, 0]
        assert logits.tolist() == pytest.approx(want, abs=1e-6)


def test_all_experts_or_no_means_is_plain_top_k_bit_for_bit() -> None:
    x = torch.randn(32, 16, dtype=torch.float64)
    for layer in (with_means(top_k=4), layer_of("default_moe", top_k=2).double()):
        other = layer_of("default_moe", top_k=layer.config.top_k, experts="uniform").double()
        other.load_state_dict(layer.state_dict(), strict=False)
        assert torch.equal(layer(x).hidden_states, other(x).hidden_states)


def test_means_move_by_their_experts_mean_output() -> None:
    """(0, 2) with mean (1, 1) becomes (.1, 1.9); without tokens it
    stays; the first is taken whole."""
    layer = layer_of("default_moe", hidden_size=2, num_experts=3)
    means = layer.experts.default
    with torch.no_grad():
        means.mean[0] = torch.tensor([0.0, 2.0])
        means.mean[1] = torch.tensor([5.0, 5.0])
        means.known.copy_(torch.tensor([1, 1, 0]))
    counters = {
        "num_tokens_per_expert": torch.tensor([4, 0, 2]),
        "output_sums": torch.tensor([[4.0, 4.0], [0.0, 0.0], [6.0, 2.0]]),
    }
    number = torch.tensor(1)
    means.after_step(Step(counters=counters, layers=[counters], affinity_p99=number, number=number))
    torch.testing.assert_close(means.mean, torch.tensor([[0.1, 1.9], [5.0, 5.0], [3.0, 1.0]]))


def test_sums_are_those_of_what_ran() -> None:
    """Over micro-batches, dropped pairs and padding left out."""
    layer = layer_of("default_moe", top_k=2, capacity="factor:capacity_factor=0.5").double()
    params = layer.experts.params(torch.float64)
    sums, counts = torch.zeros(4, 16, dtype=torch.float64), torch.zeros(4)
    for count in (9, 5, 0):
        x = torch.randn(count, 16, dtype=torch.float64)
        mask = torch.arange(len(x)) != 2
        with Collector(layer):
            layer(x, RoutingContext(valid_mask=mask))
        routing, limit = layer.route(x, RoutingContext(valid_mask=mask))
        kept = layer.keep(routing, limit).selection.kept
        for t, e in zip(routing.token[kept].tolist(), routing.expert[kept].tolist(), strict=True):
            sums[e] += feed_forward(x[t], params, e).detach()
            counts[e] += 1
    torch.testing.assert_close(layer.pending["output_sums"], sums)
    after_step(layer)
    want = sums / counts.clamp_min(1)[:, None]
    torch.testing.assert_close(layer.experts.default.mean.double(), want, rtol=1e-5, atol=1e-6)


def test_resumed_frozen_and_counted_once_under_recomputation() -> None:
    layer, other = (layer_of("default_moe", top_k=2) for _ in range(2))
    x = torch.randn(32, 16)
    learn(layer, x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    learn(layer, 2 * x)
    with Collector(other):
        y = torch.utils.checkpoint.checkpoint(other, 2 * x, use_reentrant=False)
    y.hidden_states.sum().backward()
    after_step(other)
    for name, value in layer.experts.default.state_dict().items():
        assert torch.equal(value, other.experts.default.get_buffer(name)), name
    before = layer.experts.default.mean.clone()
    learn(layer.eval(), x)
    assert torch.equal(layer.experts.default.mean, before)


def test_a_later_token_changes_nothing_before() -> None:
    layer, x = with_means(top_k=2), torch.randn(16, 16, dtype=torch.float64)
    later = x.clone()
    later[8:] *= -3
    for training in (True, False):
        y, z = (layer.train(training)(tokens).hidden_states[:8] for tokens in (x, later))
        torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", ["layers", "inner steps"])
def test_one_bank_moves_once_a_step_by_the_tokens_of_all_who_share_it(how: str) -> None:
    """Not once for each of them: in the second step a mean keeps 0.9 of itself, not 0.81."""
    model: torch.nn.Module = layer_of("default_moe", inner_steps=2).double()
    if how == "layers":
        config = layer_of("default_moe", experts="shared:defaults").config
        model = torch.nn.ModuleList(MoE(config, place) for place in range(2)).double()
        tie_experts(list(model))
    layers, counts = moe_layers(model), []
    means = layers[0].bank.default
    sums = []
    for x in torch.randn(2, 32, 16, dtype=torch.float64):
        with Collector(model):
            for layer in layers[: 1 if how == "inner steps" else 2]:
                layer(x)
        pending = [layer.pending for layer in layers]
        sums.append(sum(stats["output_sums"] for stats in pending))
        counts.append(sum(stats["num_tokens_per_expert"] for stats in pending))
        assert counts[-1].sum() == 64
        after_step(model)
    assert min(count.min() for count in counts) > 0
    first, second = (s / n[:, None] for s, n in zip(sums, counts, strict=True))
    want = 0.9 * first + 0.1 * second
    torch.testing.assert_close(means.mean.double(), want, rtol=1e-5, atol=1e-6)
    assert means.known.tolist() == [2] * 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "remoe"}, r"experts='defaults' weighs .*'remoe' has no prob"),
        ({"router": "token_choice:gate=sigmoid"}, r"'token_choice' has no gates that are its prob"),
        ({"router": "x_moe"}, r"'x_moe' has no gates that are its prob"),
        ({"top_k": 2, "normalize": "chosen"}, "normalize='chosen' must be 'none'"),
        ({"top_k": 2, "normalize": None, "experts": "shared:defaults"}, "normalize='chosen' must"),
        ({"routed_scale": 2.0}, r"routed_scale=2\.0 must be 1"),
    ],
)
def test_weights_that_are_no_probabilities_are_refused(
    options: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        layer_of("default_moe", **options)


def test_counters_without_tokens_are_refused() -> None:
    layer, x = layer_of("default_moe"), torch.randn(4, 16)
    routing, limit = layer.route(x, RoutingContext())
    kept = layer.keep(routing, limit)
    with pytest.raises(ValueError, match=r"experts='defaults' learns .*: give `stats` the tokens"):
        layer.stats(routing, kept)
    assert "output_sums" in layer.stats(routing, kept, x=x)
    assert "output_sums" not in layer.stats(routing, kept, learns=False)


def cosines(model: Net, toy: Toy, generator: torch.Generator) -> tuple[float, float]:
    """Cosine of the router's gradient with that of all experts run, without and with means."""
    layer = model.layers[0]
    x, y, _ = toy.draw(256, generator)
    params, weight = layer.experts.params(x.dtype), layer.router.weight
    with torch.no_grad():
        upstream = 2 * (layer(x).hidden_states - y) / y.numel()
        hidden = torch.nn.functional.gelu(torch.einsum("td,eid->tei", x, params.up))
        outputs = torch.einsum("tei,edi->ted", hidden, params.down)
    pi = (x @ weight.T).softmax(-1)
    chosen = torch.zeros_like(pi).scatter(1, pi.topk(layer.config.top_k).indices, 1.0)[..., None]
    means = layer.experts.default.mean
    found = [
        torch.autograd.grad(
            (pi * torch.einsum("td,ted->te", upstream, values)).sum(), weight, retain_graph=True
        )[0].flatten()
        for values in (outputs, outputs * chosen, torch.where(chosen > 0, outputs, means))
    ]
    near = torch.nn.functional.cosine_similarity
    return float(near(found[1], found[0], 0)), float(near(found[2], found[0], 0))


@pytest.mark.measured
@pytest.mark.criterion
def test_the_routers_gradient_is_nearer() -> None:
    """In a model trained by top_k = 1 or 2 of 8 alone the router's gradient with mean outputs is
    nearer to that with all experts run: its cosine is higher than without, in each of 3 seeds."""

    def target(toy: Toy, x: Tensor, cluster: Tensor) -> Tensor:
        maps = torch.einsum("td,tdh->th", x, toy.maps[cluster])
        return torch.tanh(maps + toy.extra[cluster])

    for top_k in (1, 2):
        for seed in range(3):
            torch.manual_seed(seed)
            model, toy = Net("default_moe", top_k=top_k), Toy(seed, target=target)
            with torch.no_grad():
                model.layers[0].router.weight.mul_(3**-0.5)  # as linear layers of torch start
            model.layers[0].experts.idle = lambda *_: None  # trained by top_k alone
            found: list[tuple[float, float]] = []
            generator, steps = torch.Generator().manual_seed(50 + seed), iter(range(600))

            def note(_: object, found: list[tuple[float, float]] = found) -> None:
                if next(steps) % 50 == 25:  # noqa: B023
                    found.append(cosines(model, toy, generator))  # noqa: B023

            train(model, toy, 600, note)
            plain, means = torch.tensor(found).mean(0).tolist()
            assert means > plain
    assert E == 8
