"""Compressed Experts: exact at first, scaled by hand, and what training the vectors recovers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_lm import loss, made, same_weights, save, small, train, trained

from etr.methods.compressed_experts import CompressExperts
from etr.moe import MoE, MoEConfig, moe_layers, reference
from etr.moe.config import parse_capacity
from etr.moe.experts import Shared
from etr.moe.experts.compressed import Compressed
from etr.moe.watch import LayerView, watch

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def layer_of(main: int = 2, top_k: int = 4, **options: Any) -> MoE:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_experts": 6, "top_k": top_k}
    fixed = {"router": "token_choice", "capacity": "none"}
    experts = f"compressed:main={main},of={top_k}"
    return MoE(MoEConfig(**{**sizes, **fixed, "experts": experts, **options})).double()


def plain(layer: MoE, x: Tensor) -> Tensor:
    """The definition, token by token."""
    seen: list[LayerView] = []
    with watch(layer, lambda place, view: seen.append(view)):
        layer(x)
    view, bank, rows = seen[0], layer.experts, []
    k, main = bank.of, bank.main
    for token in range(len(x)):
        pairs = range(token * k, token * k + k)
        chosen = [
            (view.routing.expert[p], view.selection.combine_weight[p], view.selection.kept[p])
            for p in pairs
        ]
        others = [(e, w) for e, w, kept in chosen[main:] if kept]
        scale = torch.ones(bank.vectors.shape[1]).double()
        if others:
            total = sum(w for _, w in others)
            scale = sum(w / total * bank.vectors[e] for e, w in others)
        one, two, inside = scale.split([8, 8, 12])
        y = torch.zeros(8).double()
        params = bank.params(torch.float64)
        for e, w, kept in chosen[:main]:
            if kept:
                gate, up = params.up[e].chunk(2)
                gate, up = gate @ (x[token] * one), up @ (x[token] * two)
                y = y + w * (params.down[e] @ (gate * gate.sigmoid() * up * inside))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("main", [1, 2, 3, 4])
@pytest.mark.parametrize("capacity", ["none", "factor:capacity_factor=0.7"])
def test_values_and_gradients_are_those_of_plain_loops(main: int, capacity: str) -> None:
    """Also where some choices of a token are dropped, and where all of them run."""
    layer = layer_of(main, capacity=parse_capacity(capacity))
    with torch.no_grad():
        layer.experts.vectors.normal_(1, 0.5)
    x = torch.randn(20, 8).double()
    found, want = layer(x).hidden_states, plain(layer, x)
    torch.testing.assert_close(found, want)
    names, values = zip(*layer.experts.named_parameters(), strict=True)
    grads = [
        torch.autograd.grad(y.square().sum(), values, allow_unused=True) for y in (found, want)
    ]
    for name, a, b in zip(names, *grads, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any(), name
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)


def test_by_hand() -> None:
    """Others of weights .3 and .2 with vectors (2, 1) and (0, 1): (1.2, 1), x = (1, 2) scaled."""
    layer = layer_of(1, 3, hidden_size=2, intermediate_size=1)
    with torch.no_grad():
        layer.experts.vectors[1, :2] = torch.tensor([2.0, 1])
        layer.experts.vectors[2, :2] = torch.tensor([0.0, 1])
    weight = torch.tensor([[0.3, 0.2]]).double()
    first, _, _ = layer.experts._scales(torch.tensor([[1, 2]]), weight)
    torch.testing.assert_close(first, torch.tensor([[1.2, 1.0]]).double())
    scaled = torch.tensor([[1.0, 2]]).double() * first
    torch.testing.assert_close(scaled, torch.tensor([[1.2, 2.0]]).double())


def test_vectors_of_one_are_the_first_choices_with_their_weights(tmp_path: Path) -> None:
    model = small(num_experts_per_tok=3)
    source = save(model, tmp_path / "a")
    other, report = made(source, tmp_path / "b", CompressExperts(main=2), compare=True)
    assert report.plan == "runs 2 of a token's 3 choices"
    layer, old = moe_layers(other)[0], moe_layers(model)[0]
    x = torch.randn(30, 16).double()
    seen: list[LayerView] = []
    with watch(old, lambda place, view: seen.append(view)), torch.no_grad():
        old(x)
        found = layer(x)
        want = torch.zeros_like(x)
        for pair, expert in enumerate(seen[0].routing.expert.tolist()):
            if pair % 3 < 2:
                token = int(seen[0].routing.token[pair])
                row = reference.expert_output(old.bank, x[token], expert)
                want[token] += seen[0].selection.combine_weight[pair].double() * row
    torch.testing.assert_close(found, want)
    extra = sum(p.numel() for p in other.parameters()) - sum(p.numel() for p in model.parameters())
    assert extra == 2 * (2 * 16 + 12) * 4  # (2H + I) E in both layers
    assert report.num_bytes - report.source_bytes == 8 * extra


def test_all_choices_are_the_identity(tmp_path: Path) -> None:
    source = save(small(), tmp_path / "a")
    assert same_weights(made(source, tmp_path / "b", CompressExperts(main=2))[0], small())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"router": "expert_choice", "capacity": None}, "tokens must choose as many experts each"),
        ({"expert_bias": True}, "with biases are not taken"),
        ({"top_k": 1}, "main=2 of 1 choices; tokens of layer 0 choose top_k=1"),
    ],
)
def test_what_it_does_not_take(options: dict, words: str) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "top_k": 2}
    layer = MoEConfig(**{**sizes, "router": "token_choice", **options})
    method = CompressExperts(main=2)
    with pytest.raises(ValueError, match=words):
        method.check(method.plan([], [layer]), [layer])
    with pytest.raises(ValueError, match="every token must choose 4 experts"):
        layer_of(2, 3, experts="compressed:main=2,of=4")(torch.randn(5, 8).double())
    for name, value in (("backend", "bmm"), ("dispatch", "permute")):
        with pytest.raises(ValueError, match=f"{name}='{value}': experts='compressed' runs the"):
            layer_of(**{name: value})
        with pytest.raises(ValueError, match=f"{name}='{value}': experts='shared' runs the"):
            layer_of(experts=Shared(wrapped=Compressed(main=2, of=4)), **{name: value})


@pytest.mark.criterion
@pytest.mark.measured
def test_vectors_recover_the_loss(tmp_path: Path) -> None:
    """Of a small language model whose tokens choose 4 experts 2 run, and training the vectors alone
    for 120 steps recovers more of the loss between 2 experts and 4 than one set of vectors for all
    experts does."""
    source, whole = save(trained(4), tmp_path / "a"), loss(trained(4))
    recovered = {}
    for name in ("own", "shared"):
        model, _ = made(source, tmp_path / name, CompressExperts(main=2))
        before = loss(model)
        for value in model.parameters():
            value.requires_grad_(False)
        vectors = [layer.experts.vectors for layer in moe_layers(model)]
        for value in vectors:
            value.requires_grad_()
            if name == "shared":  # a gradient for all is a mean for each
                value.register_hook(lambda grad: grad.mean(0, keepdim=True).expand_as(grad))
        train(model, 120, rate=2e-2, parameters=vectors)
        recovered[name] = (before - loss(model)) / (before - whole)
    print({"whole": whole, **recovered})
    assert recovered["own"] > recovered["shared"] > 0
