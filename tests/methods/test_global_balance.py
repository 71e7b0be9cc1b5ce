"""Global-batch balance: what counts as load is what all ranks and micro-batches chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from decisions import layer_of
from torch import Tensor

from etr.moe import Collector, MoE, RoutingContext, after_step
from etr.moe.losses import balance_loss
from etr.moe.routing import Routing
from etr.moe.select import token_pairs

TOWARDS = 30.0
"""Logit of the expert that a token wants, which others have at 0."""


def layer(**options: Any) -> MoE:
    """In float64; tokens' first four numbers are their logits."""
    found = layer_of("global_balance", losses="balance:mode=running,weight=1", **options).double()
    with torch.no_grad():
        found.router.weight.copy_(torch.eye(found.num_choices, 16))
    return found


def domain(expert: int, num_tokens: int = 8) -> Tensor:
    """Tokens that want one expert alone."""
    x = torch.zeros(num_tokens, 16, dtype=torch.float64)
    x[:, expert] = TOWARDS
    return x


def losses_of_a_step(layer: MoE, batches: Sequence[Tensor]) -> list[float]:
    """Balance loss of each micro-batch of one optimizer step."""
    found = []
    for x in batches:
        with Collector(layer) as collector:
            layer(x)
        found.append(collector.loss().item())
    after_step(layer)
    return found


def on_ranks(works: Sequence[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ranks find that run one after the other, where no rank's sums depend on another's.

    In a first pass they say what they would sum; in the second they get the sums.
    """
    said: list[list[Tensor]] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: len(works))
    for work in works:
        said.append([])
        monkeypatch.setattr(dist, "all_reduce", lambda x, group=None: said[-1].append(x.clone()))
        work()
    sums = [sum(values) for values in zip(*said, strict=True)]
    found = []
    for work in works:
        answers = iter(sums)
        monkeypatch.setattr(dist, "all_reduce", lambda x, group=None, a=answers: x.copy_(next(a)))
        found.append(work())
    return found


def loss_and_gradient(layer: MoE, x: Tensor, **fields: Any) -> tuple[Tensor, Tensor]:
    loss = layer(x, RoutingContext(**fields)).losses["aux"]
    return loss.detach(), torch.autograd.grad(loss, layer.router.weight)[0]


@pytest.mark.criterion
def test_micro_batches_and_ranks_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-batches of one domain each, every one with an expert of its own (E = 4), have
    loss 4 each by themselves, and 4, 2, 4/3 and 1 in order; 2 ranks have the value and the
    gradient of 1 rank that holds all tokens."""
    domains = [domain(expert) for expert in range(4)]
    for x in domains:
        assert losses_of_a_step(layer(), [x]) == pytest.approx([4])
    one = layer()
    for _ in range(2):  # every step begins afresh
        assert losses_of_a_step(one, domains) == pytest.approx([4, 2, 4 / 3, 1])

    one = layer(top_k=2)
    x, mask = torch.randn(12, 16).double(), torch.ones(12, dtype=torch.bool)
    mask[7:] = False  # ranks of unequal numbers of tokens: 6 and 1
    works = [
        lambda part=part: loss_and_gradient(
            one, x[part], valid_mask=mask[part], data_group=object()
        )
        for part in (slice(0, 6), slice(6, 12))
    ]
    found = on_ranks(works, monkeypatch)
    for got, want in zip(zip(*found, strict=True), loss_and_gradient(one, x[:7]), strict=True):
        torch.testing.assert_close(sum(got) / 2, want, rtol=1e-12, atol=1e-14)


def routing_of(probs: Sequence[float], counts: Sequence[int]) -> Routing:
    """One routing of tokens with equal probabilities and given choices per expert."""
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    valid = torch.ones(len(expert), dtype=torch.bool)
    token, flat = token_pairs(expert[:, None], valid, len(counts))
    table = torch.tensor(probs, dtype=torch.float64).expand(len(expert), -1)
    return Routing(
        token=token,
        expert=flat,
        score=None,
        gate=torch.ones(len(expert)),
        valid_mask=valid,
        scores=None,
        logits=None,
        probs=table,
        num_experts=len(counts),
        top_k=1,
    )


def test_two_ranks_by_hand() -> None:
    """Choices [3, 1] and [2, 2], P [.7, .3] and [.4, .6]: each with its own load 1.2 and 1.0; with
    both 1.1 and .95, whose mean is the loss of one rank."""
    ranks = [routing_of([0.7, 0.3], [3, 1]), routing_of([0.4, 0.6], [2, 2])]
    loads = [rank.num_choices_per_expert() for rank in ranks]
    own = [balance_loss(r, load).item() for r, load in zip(ranks, loads, strict=True)]
    assert own == pytest.approx([1.2, 1.0])
    shared = [balance_loss(r, loads[0] + loads[1]).item() for r in ranks]
    assert shared == pytest.approx([1.1, 0.95])
    one = balance_loss(routing_of([0.55, 0.45], [5, 3]), loads[0] + loads[1])
    assert one.item() == pytest.approx(sum(shared) / 2) == pytest.approx(1.025)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("top_k", [1, "all"])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_value_and_gradient_are_those_of_plain_loops(
    num_tokens: int, top_k: int | str, num_experts: int
) -> None:
    """Of a second micro-batch, whose load counts the first."""
    k = num_experts if top_k == "all" else int(top_k)
    one = layer(num_experts=num_experts, top_k=k, capacity="none")
    batches = [torch.randn(6, 16).double(), torch.randn(num_tokens, 16).double()]
    with Collector(one):
        one(batches[0])
    with Collector(one):
        loss, gradient = loss_and_gradient(one, batches[1])

    counts = [0] * num_experts
    tables = [(x @ one.router.weight.T).softmax(-1) for x in batches]
    for row in torch.cat(tables).tolist():
        for e in sorted(range(num_experts), key=lambda e: (-row[e], e))[:k]:
            counts[e] += 1
    want = sum(
        num_experts * counts[e] / sum(counts) * probs[e] / num_tokens
        for probs in tables[1]
        for e in range(num_experts)
    )
    want = want if num_tokens else one.router.weight.sum() * 0
    torch.testing.assert_close(loss, want.detach(), rtol=1e-12, atol=1e-14)
    (expected,) = torch.autograd.grad(want, one.router.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)
