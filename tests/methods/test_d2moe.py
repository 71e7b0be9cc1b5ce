"""D2MoE: levels by hand, prefixes, what is stored, who reads what, and the order of loading."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_lm import batch, loss, made, same_weights, save, small, teach, tokens, trained

from etr.hf import EtrForCausalLM, load_pretrained
from etr.methods.d2moe import BITS, D2Moe, RoutedBits, RoutedExperts
from etr.moe import MoE, MoEConfig, RoutingContext, moe_layers
from etr.moe.experts.nested import buffers_of, nested, read
from etr.moe.routing import Routing
from etr.moe.watch import LayerView, watch
from etr.systems.loading import loading_order, makespan

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
NEEDS = [[5, 3, 1], [9, 2, 0], [2, 2, 2]]
LOADS, COMPUTE = [2.0, 1.0, 1.0], 0.4


def by_expert(needs: list[list[int]]) -> list[tuple[int, int]]:
    return [(e, level) for e, counts in enumerate(needs) for level, n in enumerate(counts) if n]


@pytest.mark.criterion
@pytest.mark.measured
def test_levels_loading_and_routing(tmp_path: Path) -> None:
    """Of Gaussian weights each of 3 levels has at most 0.4 of the error of the one below, and is
    the same bit for bit where those above are missing; loading by need ends no later than expert by
    expert in 200 of 200 cases, and at 12.4 where that ends at 12.8; of a small language model,
    routers that are trained for 40 steps read fewer bits the larger alpha is, and with alpha = 0.03
    fewer than 3 at a loss below that of 3 for all, and at least 0.02 below that of the same levels
    dealt to other pairs."""
    _levels()
    _loading()
    whole = trained()
    source = save(whole, tmp_path / "lm")
    three = loss(made(source, tmp_path / "three", D2Moe(use=2))[0])
    found = {}
    for alpha in (0.0, 0.03, 0.1):
        method = D2Moe(route=True, alpha=alpha)
        model = teach(made(source, tmp_path / f"{alpha}", method)[0], whole, 40)
        with dealt_out(model):
            others = loss(model)
        found[alpha] = {"bits": bits_of(model), "loss": loss(model), "dealt out": others}
    print({"loss": loss(whole), "3 bits": three, **found})
    assert found[0.0]["bits"] > found[0.03]["bits"] > found[0.1]["bits"]
    assert found[0.03]["bits"] < 3
    assert found[0.03]["loss"] < three
    assert found[0.03]["loss"] <= found[0.03]["dealt out"] - 0.02


def bits_of(model: EtrForCausalLM) -> float:
    """Bits a weight that pairs read of held-out text."""
    generator, total, pairs = torch.Generator().manual_seed(1), 0.0, 0
    for _ in range(4):
        for stats in model(input_ids=batch(generator, split=1)).routing_stats:
            total += float(stats[BITS])
            pairs += int(stats["num_tokens_per_expert"].sum())
    return total / pairs


@contextmanager
def dealt_out(model: EtrForCausalLM) -> Iterator[None]:
    """Each pair reads what another one of its layer would."""
    banks = [layer.experts for layer in moe_layers(model)]

    def instead(bank: RoutedExperts, x: Tensor, routing: Routing) -> Tensor:
        found = RoutedExperts.probs(bank, x, routing)
        return found[torch.randperm(len(found))]

    for bank in banks:
        bank.probs = partial(instead, bank)
    yield
    for bank in banks:
        del bank.probs


def _levels() -> None:
    weight = torch.randn(64, 128)
    levels = nested(weight, 2, 3, 16)
    errors = [float((read(levels, use) - weight).square().mean()) for use in (1, 2, 3)]
    assert errors[1] <= 0.4 * errors[0]
    assert errors[2] <= 0.4 * errors[1]
    for use in (1, 2):
        fewer = nested(weight, 2, use, 16)
        assert torch.equal(fewer.base, levels.base)
        assert torch.equal(fewer.signs, levels.signs[: use - 1])
        assert torch.equal(read(fewer, use), read(levels, use))


def _loading() -> None:
    order = loading_order(NEEDS)
    assert makespan(order, NEEDS, LOADS, COMPUTE) == pytest.approx(12.4)
    assert makespan(by_expert(NEEDS), NEEDS, LOADS, COMPUTE) == pytest.approx(12.8)
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        most = torch.randint(0, 12, (6,), generator=generator).tolist()
        needs = [[n, int(0.6 * n), int(0.3 * n)] for n in most]
        found = makespan(loading_order(needs), needs, LOADS, COMPUTE)
        assert found <= makespan(by_expert(needs), needs, LOADS, COMPUTE) + 1e-9


def test_levels() -> None:
    _levels()


def test_loading() -> None:
    _loading()


def test_by_hand() -> None:
    """Weights 0, .1, .4, 1 in one group: steps of a third, then of .041667 twice."""
    levels = nested(torch.tensor([[0.0, 0.1, 0.4, 1.0]]), 2, 3, 4)
    wants = (
        [0, 0, 1 / 3, 1],
        [0.041667, 0.041667, 0.375, 1.041667],
        [0, 0.083333, 0.416667, 1],
    )
    for use, want in enumerate(wants, 1):
        torch.testing.assert_close(read(levels, use)[0], torch.tensor(want), atol=1e-6, rtol=0)


def test_the_order_by_hand_is_the_best_of_all() -> None:
    """Nested levels come in order, the most needed head first, and nobody's levels never."""
    order = loading_order(NEEDS)
    assert order == [(1, 0), (0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (2, 2), (0, 2)]
    spans = []
    for experts in set(permutations([expert for expert, _ in order])):
        heads, items = [0, 0, 0], []
        for expert in experts:
            items.append((expert, heads[expert]))
            heads[expert] += 1
        spans.append(makespan(items, NEEDS, LOADS, COMPUTE))
    assert min(spans) == pytest.approx(12.4)
    total = sum(LOADS[level] for _, level in order)
    work = COMPUTE * sum(NEEDS[expert][level] for expert, level in order)
    assert min(spans) >= max(total, LOADS[0] + work)
    assert loading_order([[0, 0], []]) == []


@pytest.mark.parametrize("group", [1, 5, 7, 128])
def test_groups_divide_a_row(group: int) -> None:
    weight = torch.randn(3, 12)
    levels = nested(weight, 4, 2, group)
    assert levels.grid.shape == (3, 12 // {1: 1, 5: 4, 7: 6, 128: 12}[group], 3)
    assert float((read(levels, 2) - weight).abs().max()) < 0.5
    even = nested(torch.full((2, 4), 0.3), 2, 3, group)
    torch.testing.assert_close(read(even, 3), torch.full((2, 4), 0.3))


def test_one_folder_serves_at_several_widths(tmp_path: Path) -> None:
    """A model told to read fewer levels is the one that has no more, bit for bit."""
    source, (given, _) = save(small(), tmp_path / "a"), tokens()
    whole, report = made(source, tmp_path / "all", D2Moe(group=4), compare=True)
    assert report.plan == "stores 4 bits a weight of the experts and their scales; reads 4"
    want = {}
    for use in (1, 2, 3):
        few, _ = made(source, tmp_path / f"few{use}", D2Moe(group=4, levels=use))
        told, _ = made(source, tmp_path / f"told{use}", D2Moe(group=4, use=use))
        with torch.no_grad():
            want[use] = few(**given).logits
            assert torch.equal(told(**given).logits, want[use])
    with torch.no_grad():
        assert torch.equal(whole(**given).logits, want[3])
        exact = small()(**given).logits
    errors = [float((want[use] - exact).abs().mean()) for use in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True)
    layer = moe_layers(whole)[0].experts
    weights = 4 * 3 * 16 * 12
    assert layer.up_base.numel() + layer.down_base.numel() == weights // 4
    assert layer.up_signs.numel() + layer.down_signs.numel() == 2 * weights // 8
    grid = sum(value.numel() for value in (layer.up_grid, layer.down_grid))
    assert grid == 4 * weights // 4  # four numbers for each group of four
    saved = 8 * weights - weights // 4 - 2 * weights // 8 - 4 * grid
    assert report.source_bytes - report.num_bytes == 2 * saved
    whole.bfloat16().save_pretrained(tmp_path / "b")
    again = moe_layers(load_pretrained(tmp_path / "b"))[0].experts
    assert torch.equal(again.matrix("up", 1), layer.matrix("up", 1))


def layer_of(**options: Any) -> MoE:
    """H 8, I 12, 4 experts, top 2, of random weights and a random router of bits, in float64."""
    given = {"hidden_size": 8, "intermediate_size": 12, "num_experts": 4, "top_k": 2}
    fixed = {"router": "token_choice", "capacity": "none", "losses": ""}
    layer = MoE(MoEConfig(**{**given, **fixed}, experts=RoutedBits(group=4, **options)))
    shapes = {"up": (4, 24, 8), "down": (4, 8, 12)}
    for name, shape in shapes.items():
        for key, value in buffers_of(torch.randn(shape), layer.experts.config).items():
            layer.experts.get_buffer(f"{name}_{key}").copy_(value)
    for value in (layer.experts.level_weight, layer.experts.level_bias):
        value.data = torch.randn_like(value)
    return layer.double()


def seen(layer: MoE, x: Tensor, **context: Any) -> tuple[LayerView, Tensor]:
    """What the layer did, and its output."""
    views: list[LayerView] = []
    with watch(layer, lambda place, view: views.append(view)):
        y = layer(x, RoutingContext(**context)).hidden_states
    return views[0], y


def plain(layer: MoE, x: Tensor, view: LayerView) -> tuple[Tensor, list[int]]:
    """All levels of each pair, one of them picked by hand; and which, -1 where none has room."""
    bank, routing, kept = layer.experts, view.routing, view.selection.kept.tolist()
    count, shares = bank.num_levels, bank.config.rooms() if layer.training else []
    of_pair: list[Tensor] = []
    for token, expert in zip(routing.token.tolist(), routing.expert.tolist(), strict=True):
        e = min(expert, 3)
        logits = bank.level_weight[e] @ x[token] + bank.level_bias[e]
        of_pair.append(logits.exp() / logits.exp().sum())
    level = [max(range(count), key=lambda k, p=p: (p[k].item(), -k)) for p in of_pair]
    for e in range(4):
        own = [p for p, expert in enumerate(routing.expert.tolist()) if expert == e and kept[p]]
        for k, share in enumerate(shares):
            queue = sorted((p for p in own if level[p] == k), key=lambda p: -of_pair[p][k].item())
            for p in queue[math.ceil(share * len(own) - 1e-6) :]:
                level[p] = -1
    y = [torch.zeros(8).double() for _ in x]
    for p, (token, expert) in enumerate(zip(routing.token, routing.expert, strict=True)):
        if not kept[p]:
            continue
        outputs = []
        for k in range(count):
            up = bank.matrix("up", int(expert), k + 1).double()
            gate, inner = (up @ x[token]).chunk(2)
            down = bank.matrix("down", int(expert), k + 1).double()
            outputs.append(down @ (gate * gate.sigmoid() * inner))
        share = of_pair[p] - of_pair[p].detach() if layer.training else torch.zeros(count)
        share = share + torch.tensor([float(level[p] == k) for k in range(count)])
        for k in range(count):
            y[token] = y[token] + view.selection.combine_weight[p] * share[k] * outputs[k]
    return torch.stack(y), level


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shares", ["", "0.3+0.4+0.3", "0+1+0.1"])
def test_each_token_reads_what_its_router_says(shares: str, training: bool) -> None:
    """Values, and in training gradients, are those of all levels in plain loops."""
    layer, x = layer_of(shares=shares).train(training), torch.randn(30, 8).double()
    x.requires_grad_()
    mask = torch.arange(30) != 4
    view, found = seen(layer, x, valid_mask=mask)
    want, level = plain(layer, x, view)
    torch.testing.assert_close(found, want)
    assert {1, 2} <= set(level)
    assert (-1 in level) == (training and bool(shares))
    assert not found[4].any()
    weight = torch.randn_like(found)
    values = (x, *layer.experts.parameters(), *layer.router.parameters())
    got, expected = (
        torch.autograd.grad((y * weight).sum(), values, allow_unused=True, retain_graph=True)
        for y in (found, want)
    )
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
    reaches = got[1] is not None and bool(got[1].any())
    assert reaches == training


def test_bits_that_are_counted_and_those_that_are_expected() -> None:
    """Of the levels that run, and by their probabilities; a token without a pair counts none."""
    layer, x = layer_of(base=4, alpha=0.5), torch.randn(20, 8).double()
    mask = torch.arange(20) < 18
    view, _ = seen(layer, x, valid_mask=mask)
    _, level = plain(layer, x, view)
    output = layer(x, RoutingContext(valid_mask=mask))
    kept = view.selection.kept
    chosen = sum(4 + k for k, ran in zip(level, kept.tolist(), strict=True) if ran)
    assert float(output.stats[BITS]) == chosen
    probs = layer.experts.probs(x, view.routing)[kept]
    expected = float((probs @ torch.tensor([4.0, 5, 6]).double()).mean().detach())
    assert float(output.losses["bits"].detach()) == pytest.approx(0.5 * expected)
    output.losses["bits"].backward()
    assert layer.experts.level_weight.grad is not None
    assert set(layer.eval()(x).stats) >= {BITS}
    assert not layer(x).losses
    assert not layer_of()(x).losses
    assert float(layer(x[:0]).stats[BITS]) == 0


def test_later_tokens_change_nothing() -> None:
    layer, x = layer_of(shares="0.1+0.1+0.1").eval(), torch.randn(12, 8).double()
    with torch.no_grad():
        found, want = layer(x).hidden_states[:5], layer(x[:5]).hidden_states
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_all_on_one_level_is_the_model_of_that_width(tmp_path: Path) -> None:
    """Bit for bit: it starts with all levels, and any other is that of `use`; saved is loaded."""
    source, (given, _) = save(small(), tmp_path / "a"), tokens()
    routed, report = made(source, tmp_path / "routed", D2Moe(group=4, route=True))
    assert report.plan.endswith("reads 2 to 4, as a router that is to be trained chooses")
    for use in (3, 2, 1):
        want, _ = made(source, tmp_path / f"told{use}", D2Moe(group=4, use=use))
        for layer in moe_layers(routed):
            layer.experts.level_bias.data = 50.0 * torch.eye(3)[use - 1].double().expand(4, 3)
        with torch.no_grad():
            found = routed(**given)
            assert torch.equal(found.logits, want(**given).logits)
        for stats in found.routing_stats:
            assert float(stats[BITS]) == (1 + use) * int(stats["num_tokens_per_expert"].sum())
    for layer in moe_layers(routed):
        for value in (layer.experts.level_weight, layer.experts.level_bias):
            value.data = torch.randn_like(value)
    routed.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, routed(**given).logits)
    beside = 4 * 3 * (16 + 1) * 8
    whole, report_whole = made(source, tmp_path / "whole", D2Moe(group=4))
    assert report.num_bytes - report_whole.num_bytes == 2 * beside
    with torch.no_grad():
        start = load_pretrained(tmp_path / "routed").eval()(**given).logits
        assert torch.equal(start, whole(**given).logits)


def test_sixteen_bits_are_the_identity(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    model, report = made(source, tmp_path / "b", D2Moe(base=16), compare=True)
    assert report.same_function
    assert same_weights(model, small())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base": 3}, "base=3 must be 1, 2, 4 or 8 bits"),
        ({"levels": 0}, "levels=0 must be at least 1"),
        ({"use": 4}, "use=4 must lie between 1 and levels=3"),
        ({"alpha": 0.1}, "are of the router of bits: give route=true"),
        ({"route": True, "alpha": -1.0}, "alpha=-1.0 must be >= 0"),
        (
            {"route": True, "shares": "0.5+0.5"},
            r"shares='0.5\+0.5' must be a share .* of 3 levels",
        ),
        ({"route": True, "shares": "a+b+c"}, "must be a share from 0 to 1"),
        ({"protect": "0.1"}, "all experts of a layer have as many bits"),
    ],
)
def test_options_are_checked(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        D2Moe(**options)
    layer = MoEConfig(hidden_size=2, intermediate_size=1, num_experts=1, router="token_choice")
    with pytest.raises(ValueError, match="use of layer 0 must lie between 1 and levels=3"):
        D2Moe().check({"use": [4]}, [layer])
