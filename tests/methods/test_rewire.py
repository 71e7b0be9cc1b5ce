"""Rewiring: identities, the worked example, a planted shift; and generation, a state a request."""

from __future__ import annotations

import pytest
import torch
from blocks import layer, route
from decisions import layer_of
from torch import Tensor, nn
from torch.nn import functional as F

from etr.methods.rewire import Rewire
from etr.model import DECODINGS
from etr.model.decoding import Deltas
from etr.moe import Collector, RoutingContext

VOCABULARY, DOMAINS, EXPERTS = 24, 6, 12


class Tagged(nn.Module):
    """Next tokens by the last token; the tag of a text's domain is added to the router's logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 24), nn.Linear(24, VOCABULARY)
        options = {"num_experts": EXPERTS, "top_k": 2, "hidden_size": 24, "intermediate_size": 32}
        options |= {"capacity": "none", "normalize": "chosen"}
        self.layer = layer_of("token_choice", **options)
        self.tag = 3 * torch.randn(DOMAINS, EXPERTS)

    def losses(self, text: Tensor, delta: Tensor | None) -> Tensor:
        """Mean loss of each row, [B]; delta [B, E]."""
        x = self.embedding(text[:, :-1])
        added = None
        if delta is not None:
            added = {0: delta[:, None].expand(-1, x.shape[1], -1).flatten(0, 1)}
        y = self.layer(F.layer_norm(x, (24,)), RoutingContext(logit_delta=added)).hidden_states
        logits = self.head(x + y)
        return F.cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none").mean(1)


def walk(table: Tensor, domain: Tensor, length: int) -> Tensor:
    """Texts of bigrams, [B, length]."""
    text = [torch.randint(VOCABULARY, domain.shape)]
    for _ in range(length - 1):
        text.append(table[domain, text[-1]].multinomial(1).flatten())
    return torch.stack(text, 1)


@pytest.mark.measured
@pytest.mark.criterion
def test_a_missing_tag_is_made_up_for() -> None:
    """Where a router misses the tag of a text's domain, which it had in training, 5 steps of rate
    0.3 on 128 tokens close half of the gap in loss or more, and each of 12 continuations gets
    better, with each of 3 seeds; weights stay, and with nothing added logits are the model's bit
    for bit (delta = 0). Where nothing is missing, steps of 0.1 change the mean loss by less than
    0.05."""
    for seed in range(3):
        torch.manual_seed(seed)
        table = (2 * torch.randn(DOMAINS, VOCABULARY, VOCABULARY)).softmax(-1)
        model = trained(table, tagged=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        unseen, (without, adapted) = continued(model, table, rate=0.3)
        with_tag = model.losses(unseen, model.tag[torch.arange(12) % DOMAINS])
        plain = trained(table, tagged=False)
        old, new = continued(plain, table, rate=0.1)[1]
        print(seed, [round(float(v.mean()), 3) for v in (with_tag, without, adapted, old, new)])
        assert without.mean() - with_tag.mean() > 0.5  # or there would be nothing to make up for
        assert without.mean() - adapted.mean() >= (without.mean() - with_tag.mean()) / 2
        assert (adapted < without).all()
        assert torch.equal(model.losses(unseen, torch.zeros(12, EXPERTS)), without)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert abs(float((new - old).mean())) < 0.05


def trained(table: Tensor, tagged: bool) -> Tagged:
    """On texts of all domains, whose tags the router has, or never sees."""
    model = Tagged()
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    for _ in range(400):
        domain = torch.randint(DOMAINS, (48,))
        delta = model.tag[domain] if tagged else None
        with Collector(model) as collector:
            loss = model.losses(walk(table, domain, 16), delta).mean()
        (loss + collector.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def continued(model: Tagged, table: Tensor, rate: float) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The last 128 tokens of 12 texts, and their losses: as they are, and fitted to the first."""
    text = walk(table, torch.arange(12) % DOMAINS, 257)
    seen, unseen = text[:, :129], text[:, 128:]
    start = {0: torch.zeros(12, EXPERTS)}
    fitted = Rewire(rate=rate, steps=5).fit(lambda d: model.losses(seen, d[0]), start)[0]
    return unseen, (model.losses(unseen, None), model.losses(unseen, fitted))


def test_worked_example() -> None:
    """Logits 2, 1, 0, -1 take experts 0 and 1 with .7311 and .2689; with 0, 1.5, 0, 0 added 1 and 0
    with .6225 and .3775."""
    one = layer(4, normalize="chosen")
    with torch.no_grad():
        one.router.weight.copy_(torch.eye(4, 16))
    x = F.pad(torch.tensor([[2.0, 1.0, 0.0, -1.0]]), (0, 12)).double()
    delta = torch.tensor([0.0, 1.5, 0.0, 0.0])
    for added, experts, weights in (
        (None, [0, 1], [0.7311, 0.2689]),
        ({0: delta}, [1, 0], [0.6225, 0.3775]),
        ({0: delta[None]}, [1, 0], [0.6225, 0.3775]),
        ({1: delta}, [0, 1], [0.7311, 0.2689]),  # another layer's
    ):
        routing = one.route(x, RoutingContext(logit_delta=added))[0]
        assert routing.expert.tolist() == experts
        found = one.keep(routing).selection.combine_weight
        assert found.tolist() == pytest.approx(weights, abs=6e-5)


def test_a_gradient_reaches_what_is_added() -> None:
    """But where weights are normalised not that of an expert that nobody chose."""
    one, x = layer(4, normalize="chosen"), torch.randn(1, 16, dtype=torch.float64)
    delta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    one(x, RoutingContext(logit_delta={0: delta})).hidden_states.sum().backward()
    chosen = route(one, x, "dropless").expert
    assert delta.grad is not None
    reached = (delta.grad.abs() > 1e-12).nonzero().flatten().tolist()
    assert reached == sorted(chosen.tolist())


@pytest.mark.parametrize("router", ["hash", "remoe", "etr:score=cosine"])
def test_routers_that_are_made_of_more_are_refused(router: str) -> None:
    one, x = layer(4, router=router, rank_by=None), torch.randn(2, 16, dtype=torch.float64)
    context = RoutingContext(logit_delta={0: torch.zeros(4)}, token_ids=torch.arange(2))
    with pytest.raises(ValueError, match=r"logit_delta: router .* is not made of its logits"):
        one(x, context)


def test_wrong_shapes_are_refused() -> None:
    one, x = layer(4), torch.randn(2, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"logit_delta of layer 0 has shape \(3,\); it must be"):
        one(x, RoutingContext(logit_delta={0: torch.zeros(3)}))
    with pytest.raises(TypeError, match=r"context\.logit_delta is Tensor; it must be a dict"):
        one(x, RoutingContext(logit_delta=torch.zeros(4)))  # type: ignore[arg-type]


def test_the_last_layers_alone_and_on_from_where_it_was() -> None:
    goal = torch.tensor([[1.0, -1.0], [0.5, 0.0]])

    def loss(deltas: Deltas) -> Tensor:
        return torch.stack([(value - goal).square().sum(1) for value in deltas.values()]).sum(0)

    start = {layer: torch.ones(2, 2) for layer in (0, 2, 5)}
    half = Rewire(layers=0.5, steps=1, rate=0.1).fit(loss, start)
    assert sorted(half) == [2, 5]
    torch.testing.assert_close(half[5], torch.tensor([[0.1, -0.1], [0.1, 0.0]]))
    on = Rewire(steps=1, rate=0.1, keep=True).fit(loss, start)
    torch.testing.assert_close(on[0], torch.tensor([[1.0, 0.9], [0.9, 0.9]]))
    assert torch.equal(start[0], torch.ones(2, 2))


@pytest.mark.parametrize("option", ["steps=0", "interval=0", "rate=-1", "layers=0", "layers=2"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        DECODINGS.parse(f"rewire:{option}")
