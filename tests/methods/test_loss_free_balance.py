"""Balance without a loss: a bias of the selection, moved against the load."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn

from etr.moe import Collector, MoE, after_step
from etr.moe.routers import TokenChoice
from etr.moe.stats import max_violation

FORMS = ("sign", "proportional", "decaying")
STEPS = {"sign": [-0.1, 0.1, 0, 0.1], "proportional": [-0.3, 0.1, 0, 0.2]}
"""What loads 5, 1, 2 and 0 move biases by, at a rate of 0.1."""
STEPS["decaying"] = [step / 2 for step in STEPS["proportional"]]  # in the fourth step


def layer_with(form: str, rate: float = 0.1, **options: object) -> MoE:
    router = TokenChoice(gate="sigmoid", bias_update=form, bias_rate=rate)
    return layer_of("loss_free_balance", router=router, capacity="none", **options)


def favoured(form: str, rate: float) -> MoE:
    """Eight experts; all tokens of `tokens` favour the first."""
    layer = layer_with(form, rate, num_experts=8)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.25)
        layer.router.weight[:, 0] = 0.0
        layer.router.weight[0, 0] = 1.5
    return layer


def tokens(num_tokens: int = 512) -> torch.Tensor:
    x = torch.randn(num_tokens, 16)
    x[:, 0] = 1.0
    return x


def violation(layer: MoE) -> float:
    choices = decide(layer.eval(), tokens(4096)).routing.num_choices_per_expert()
    return float(max_violation(choices))


@pytest.mark.criterion
@pytest.mark.parametrize(
    ("form", "rate", "steps"),
    [("sign", 4e-3, 130), ("proportional", 1.2e-4, 80), ("decaying", 8e-4, 80)],
)
def test_the_bias_alone_evens_the_load(form: str, rate: float, steps: int) -> None:
    """Where one of 8 experts is the favourite of all tokens, the bias alone brings MaxVio from
    over 2 to under 0.25, in each of its three forms, and combine weights are those of the scores
    without it."""
    layer = favoured(form, rate)
    assert violation(layer) > 2
    layer.train()
    for _ in range(steps):
        assert not learn(layer, tokens())
    assert violation(layer) < 0.25
    view = decide(layer, tokens())
    logits = view.x @ layer.router.weight.T
    chosen = logits.sigmoid()[view.routing.token, view.routing.expert]
    assert torch.allclose(view.selection.combine_weight, chosen)
    assert (logits.argmax(-1) != view.routing.expert).any()  # the bias did change choices


def test_the_card_asks_for_the_published_step() -> None:
    """By sign, at 0.001; a rate and another form are options after its name."""
    layer = layer_of("loss_free_balance")
    assert (layer.router.selection.update, layer.router.selection.rate) == ("sign", 0.001)
    assert layer.config.loss_weights["balance"] == 0


def loaded(layer: MoE, experts: list[int]) -> torch.Tensor:
    """Tokens that choose these experts as long as biases are small."""
    with torch.no_grad():
        layer.router.weight.copy_(50 * torch.eye(4, 16))
    x = torch.zeros(len(experts), 16)
    x[range(len(experts)), experts] = 1.0
    return x


LOADS = [0, 0, 0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("form", FORMS)
def test_one_step_by_hand(form: str) -> None:
    """Loads 5, 1, 2, 0 of 8 tokens, mean 2; the same in one micro-batch or in four."""
    for parts in (1, 4):
        layer = layer_with(form)
        layer.state.step.fill_(3)  # steps done
        for x in loaded(layer, LOADS).chunk(parts):
            with Collector(layer):
                layer(x)
        assert torch.equal(layer.router.selection.bias, torch.zeros(4))  # not before the step
        after_step(layer)
        torch.testing.assert_close(layer.router.selection.bias, torch.tensor(STEPS[form]))
        learn(layer.eval(), loaded(layer, LOADS))
        torch.testing.assert_close(layer.router.selection.bias, torch.tensor(STEPS[form]))


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_layer_goes_on_in_the_step_where_it_stopped(form: str) -> None:
    layer, other = layer_with(form, 0.01), layer_with(form, 0.01)
    x = loaded(layer, LOADS)
    for _ in range(2):
        learn(layer, x)
    other.load_state_dict(layer.state_dict())
    for one in (layer, other):
        learn(one, x)
    assert torch.equal(other.router.selection.bias, layer.router.selection.bias)
    want = torch.tensor(STEPS["proportional"]) / 10 * sum(t**-0.5 for t in (1, 2, 3))
    if form == "decaying":
        torch.testing.assert_close(layer.router.selection.bias, want)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4)])
def test_a_load_that_is_even_by_construction_moves_nothing(num_experts: int, top_k: int) -> None:
    layer = layer_with("sign", num_experts=num_experts, top_k=top_k)
    for num_tokens in (0, 1, 7):
        learn(layer, tokens(num_tokens))
    assert not layer.router.selection.bias.any()


def test_the_bias_chooses_and_does_not_weigh() -> None:
    """Scores .5, .4, .1 with bias -.2, 0, 0: expert 1, weight .4, and no gradient into the bias."""
    layer = layer_of("loss_free_balance", num_experts=3, capacity="none")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(3, 16))
        layer.router.selection.bias[0] = -0.2
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([0.5, 0.4, 0.1]).logit()
    view = decide(layer, x)
    assert view.routing.expert.tolist() == [1]
    assert view.selection.combine_weight.tolist() == pytest.approx([0.4])
    assert not layer.router.selection.bias.requires_grad


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_outputs_and_gradients_are_those_of_plain_loops(top_k: int) -> None:
    """With a bias that has moved; weights of several experts are normalised."""
    from etr.moe import reference

    layer = layer_with("sign", top_k=top_k).double()
    layer.router.selection.bias.copy_(torch.tensor([0.3, -0.2, 0.1, -0.2]))
    bias, x = layer.router.selection.bias.tolist(), torch.randn(9, 16).double().requires_grad_()
    rows = []
    for token in x:
        scores = torch.stack([torch.sigmoid(row @ token) for row in layer.router.weight])
        chosen = sorted(range(4), key=lambda e: (-(scores[e].item() + bias[e]), e))[:top_k]
        total = sum(scores[e] for e in chosen) if top_k > 1 else 1.0
        outputs = [reference.expert_output(layer.bank, token, e) for e in chosen]
        rows.append(sum(scores[e] / total * y for e, y in zip(chosen, outputs, strict=True)))
    found, want = layer(x).hidden_states, torch.stack(rows)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    upstream, leaves = torch.randn_like(want), (x, layer.router.weight)
    grads = [torch.autograd.grad((value * upstream).sum(), leaves) for value in (found, want)]
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
