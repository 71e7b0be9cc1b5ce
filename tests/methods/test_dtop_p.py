"""DTop-p: a probability to be held, and a controller that moves it."""

from __future__ import annotations

import itertools

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor, nn
from toys import Net, Toy, train

from etr.methods.dtop_p import Controller, DTopP
from etr.moe import Collector, MoE, after_step
from etr.moe.context import RouterInput
from etr.moe.learner import Step
from etr.moe.routing import Scores

P = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)


def taken(layer: MoE, p: float, probs: Tensor = P) -> list[int]:
    """Experts that tokens of these probabilities take at p, one list of all tokens."""
    with torch.no_grad():
        layer.router.controller.p.fill_(p)
    inputs = RouterInput(
        valid_mask=torch.ones(len(probs), dtype=torch.bool),
        token_ids=None,
        token_index=torch.arange(len(probs)),
        step=torch.tensor(0),
        layer_index=0,
    )
    scores = Scores(scores=probs, logits=probs.log(), gates=probs, probs=probs)
    return layer.router.choose(scores, inputs).expert.tolist()


@pytest.mark.parametrize(
    ("p", "want"),
    [(0.0, [0]), (0.5, [0]), (0.7, [0, 1]), (0.8, [0, 1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_the_smallest_set_that_holds_p(p: float, want: list[int]) -> None:
    assert taken(layer_of("dtop_p"), p) == want + [4] * (4 - len(want))


def test_more_p_is_more_experts() -> None:
    probs = torch.randn(50, 4, dtype=torch.float64).softmax(-1)
    layer = layer_of("dtop_p")
    counts = [
        [sum(e < 4 for e in taken(layer, p / 20, probs)[4 * t : 4 * t + 4]) for t in range(50)]
        for p in range(21)
    ]
    for fewer, more in itertools.pairwise(counts):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))


def test_logits_are_normalised_over_a_tokens_experts() -> None:
    """(3, 1, 0, 0) becomes (1.633, 0, -.8165, -.8165); 7 times the weight changes nothing."""
    layer = layer_of("dtop_p", top_k=4).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 16))
        layer.router.controller.p.fill_(0.7)
    x = torch.zeros(2, 16, dtype=torch.float64)
    x[0, :4] = torch.tensor([3.0, 1.0, 0.0, 0.0])
    view = decide(layer, x)
    assert view.routing.logits[0].tolist() == pytest.approx([1.633, 0, -0.8165, -0.8165], abs=5e-5)
    assert view.routing.probs[0].tolist() == pytest.approx([0.731, 0.143, 0.063, 0.063], abs=5e-4)
    assert view.routing.probs[1].tolist() == [0.25] * 4  # all alike, and no NaN
    with torch.no_grad():
        layer.router.weight.mul_(7)
    torch.testing.assert_close(decide(layer, x).routing.probs, view.routing.probs)
    x.requires_grad_()
    layer(x).hidden_states.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_weights_are_shares_of_what_was_taken() -> None:
    """P = (.5, .3, .15, .05) at p = .7: .625 and .375; with top_k = 1 too."""
    for top_k in (1, 2):
        layer = layer_of("dtop_p", top_k=top_k).double()
        with torch.no_grad():
            layer.router.weight.copy_(torch.eye(4, 16))
            layer.router.scale.copy_(P.log().std(correction=0)[None])
            layer.router.controller.p.fill_(0.7)
        x = torch.zeros(1, 16, dtype=torch.float64)
        x[0, :4] = P.log()
        weights = decide(layer, x).selection.combine_weight
        assert weights.tolist() == pytest.approx([0.625, 0.375, 0.0, 0.0])


def test_against_plain_loops() -> None:
    """Weights and their gradients."""
    layer = layer_of("dtop_p", num_experts=5).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    view = decide(layer, x)
    found = torch.zeros(9, 6, dtype=torch.float64).index_put(
        (view.routing.token, view.routing.expert), view.selection.combine_weight, accumulate=True
    )[:, :5]
    rows = []
    for token in x:
        raw = [(row * token).sum() for row in layer.router.weight]
        mean = sum(raw) / 5
        std = (sum((r - mean) ** 2 for r in raw) / 5).sqrt()
        exps = [(layer.router.scale[0] * (r - mean) / std).exp() for r in raw]
        probs = [e / sum(exps) for e in exps]
        chosen: list[int] = []
        for e in sorted(range(5), key=lambda e: -float(probs[e].detach())):
            if not chosen or float(sum(probs[i].detach() for i in chosen)) < 0.5:
                chosen.append(e)
        mass = sum(probs[i] for i in chosen)
        rows.append(
            torch.stack([probs[e] / mass if e in chosen else x.sum() * 0 for e in range(5)])
        )
    want = torch.stack(rows)
    torch.testing.assert_close(found, want)
    probe, values = torch.randn_like(want), list(layer.router.parameters())
    for got, right in zip(
        torch.autograd.grad((found * probe).sum(), values),
        torch.autograd.grad((want * probe).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-9)


def stepped(controller: Controller, *experts_a_token: float) -> list[float]:
    """p after steps of 1000 tokens in each of two layers."""
    found = []
    for a in experts_a_token:
        layers = [
            {"num_taken_and_takers": torch.tensor([round(1000 * a * share), 1000])}
            for share in (0.5, 1.5)
        ]
        step = Step(
            counters=layers[0],
            layers=layers,
            affinity_p99=torch.zeros(()),
            number=torch.tensor(1),
        )
        controller.after_step(step)
        found.append(float(controller.p))
    return found


def test_the_controller_by_hand() -> None:
    """E = 8, target 2, means 3, 2.5, 2 of two unequal layers."""
    found = stepped(Controller(DTopP(), 8, 2), 3, 2.5, 2)
    assert found == pytest.approx([0.46875, 0.478125, 0.490625], abs=1e-7)


def test_a_controller_of_its_own_sees_its_own_layer() -> None:
    found = stepped(Controller(DTopP(per_layer=True), 8, 2), 4)
    assert found == [0.5]  # its layer has 2


def test_p_comes_back_from_its_bound_at_once() -> None:
    """100 steps of 8 experts a token, then 0: p leaves 0.01 within two steps."""
    controller = Controller(DTopP(), 8, 2)
    assert stepped(controller, *[5.0] * 100)[-1] == pytest.approx(0.01)
    assert stepped(controller, 0, 0)[-1] > 0.02


def test_layers_share_p_and_a_step_without_tokens_leaves_it() -> None:
    model = nn.ModuleList(layer_of("dtop_p", top_k=2) for _ in range(2))
    for x in (torch.randn(32, 16), torch.randn(0, 16)):
        with Collector(model):
            for layer in model:
                layer(x)
        after_step(model)
        first, second = (float(layer.router.controller.p) for layer in model)
        assert first == second != 0.5
    before = first
    learn(model[0].eval(), torch.randn(32, 16))
    assert float(model[0].router.controller.p) == before


@pytest.mark.measured
@pytest.mark.criterion
def test_the_number_is_held() -> None:
    """In two layers of 8 experts, from p = 0.5 and from 0.95, tokens take 2 +- 0.06 experts on
    average over the last 200 of 600 steps, where a fixed p = 0.5 gives fewer than 1.5."""
    found = {}
    for name in ("start=0.5", "start=0.95", "proportional=0,integral=0"):
        for seed in range(2):
            torch.manual_seed(seed)
            counts: list[float] = []

            def note(stats: list[dict[str, Tensor]], counts: list[float] = counts) -> None:
                taken = sum(int(layer["num_choices_per_expert"].sum()) for layer in stats)
                counts.append(taken / 256 / len(stats))

            train(Net("dtop_p", 2, top_k=2, router=f"dtop_p:{name}"), Toy(seed), 600, note)
            found[name, seed] = sum(counts[-200:]) / 200
    print(found)
    for (name, _), mean in found.items():
        assert mean < 1.5 if "integral" in name else abs(mean - 2) <= 0.06
