"""ReMoE: open gates run, and a loss holds their number."""

from __future__ import annotations

import math

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor, nn
from toys import Net, Toy, train

from etr.moe import Collector, MoE, after_step


def worked(logits: list[list[float]], top_k: int = 1, **options: object) -> tuple[MoE, Tensor]:
    """A layer in float64 whose router gives these logits to the tokens, [T, E]."""
    table = torch.tensor(logits, dtype=torch.float64)
    layer = layer_of("remoe", num_experts=table.shape[1], top_k=top_k, **options).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(table.shape[1], 16))
    return layer, torch.cat((table, torch.zeros(len(table), 16 - table.shape[1])), dim=1)


def loss_of(layer: MoE, x: Tensor) -> Tensor:
    (loss,) = layer(x).losses.values()
    return loss


@pytest.mark.parametrize(
    ("logits", "balanced", "plain"),
    [([[0.5, -0.2], [-0.1, 0.3]], 0.4, 0.4), ([[1.0, 0.5], [0.5, 0.0]], 1.75, 1.0)],
)
def test_worked_losses(logits: list[list[float]], balanced: float, plain: float) -> None:
    for text, want in (("", balanced), (",balanced=false", plain)):
        layer, x = worked(logits, losses=f"open_gates:weight=1{text}")
        assert float(loss_of(layer, x).detach()) == pytest.approx(want, rel=1e-12)


def test_even_loads_of_one_gate_give_k_times_it() -> None:
    """Four tokens, four experts, two each with gate .3: loss 2 * .3."""
    rows = [[0.3, 0.3, -1, -1], [-1, 0.3, 0.3, -1], [-1, -1, 0.3, 0.3], [0.3, -1, -1, 0.3]]
    layer, x = worked(rows, top_k=2, losses="open_gates:weight=1")
    assert float(loss_of(layer, x).detach()) == pytest.approx(0.6, rel=1e-12)


def test_against_plain_loops() -> None:
    """Output, loss and gradients; a gate that is not open has none, and no expert runs for it."""
    layer, x = worked(torch.randn(7, 4).tolist(), top_k=2, losses="open_gates:weight=1")
    weights = list(layer.router.parameters())
    experts = layer.experts.params(torch.float64)
    found = layer(x)
    y, loss, gates = [], x.new_zeros(()), (x @ layer.router.weight.T).relu()
    for token, row in zip(x, gates, strict=True):
        total = torch.zeros(16, dtype=torch.float64)
        for e in range(4):
            share = 4 * int((gates[:, e] > 0).sum()) / (2 * 7)
            loss = loss + share * row[e] / 7
            if row[e] > 0:
                half = experts.up[e] @ token
                hidden = nn.functional.silu(half[:8]) * half[8:]
                total = total + row[e] * (experts.down[e] @ hidden)
        y.append(total)
    torch.testing.assert_close(found.hidden_states, torch.stack(y))
    torch.testing.assert_close(found.losses["open_gates"], loss)
    probe = torch.randn(7, 16, dtype=torch.float64)
    for got, want in zip(
        torch.autograd.grad(
            (found.hidden_states * probe).sum() + found.losses["open_gates"], weights
        ),
        torch.autograd.grad((torch.stack(y) * probe).sum() + loss, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_opening_a_gate_changes_nothing_at_once() -> None:
    """At +-1e-9 the outputs are 1e-8 apart at most, though another expert runs."""
    layer, shut = worked([[-1e-9, 0.5]])
    opened = shut.clone()
    opened[0, 0] = 1e-9
    assert [decide(layer, x).routing.valid.sum() for x in (shut, opened)] == [1, 2]
    before, after = layer(shut).hidden_states, layer(opened).hidden_states
    assert (after - before).abs().max() < 1e-8


def test_the_pressure_follows_the_sign_of_what_is_too_many() -> None:
    """Experts a token 1.5, 1, .5 for k = 1: times 1.2, as it is, over 1.2, and never below 1."""
    layer, _ = worked([[1.0, -1.0]])
    seen = []
    for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, 1]], [[-1, -1], [1, -1]], [[-1, -1], [-1, -1]]):
        with torch.no_grad():
            x = torch.zeros(2, 16, dtype=torch.float64)
            x[:, :2] = torch.tensor(rows)
        learn(layer, x)
        seen.append(float(layer.router.pressure.factor))
    assert seen == pytest.approx([1.2, 1.2, 1.0, 1.0])
    assert math.log(1e-3 / 1e-8) / math.log(1.2) == pytest.approx(63.1, abs=0.05)


def test_layers_share_one_pressure() -> None:
    """One layer takes 2 of 2 experts and another none: on average k = 1, so it stays."""
    (full, x), (none, y) = worked([[1.0, 1.0]]), worked([[-1.0, -1.0]])
    model = nn.ModuleList((full, none))
    for tokens, want in (((x, y), 1.0), ((x, -y), 1.2)):
        with Collector(model):
            full(tokens[0]), none(tokens[1])
        after_step(model)
        factors = [float(layer.router.pressure.factor) for layer in (full, none)]
        assert factors == pytest.approx([want, want])


def test_the_gates_are_not_normalised() -> None:
    layer, x = worked([[0.5, 0.25]], top_k=2)
    assert decide(layer, x).selection.combine_weight.tolist() == [0.5, 0.25]


@pytest.mark.measured
@pytest.mark.criterion
def test_the_three_stages() -> None:
    """On clustered tokens, top_k = 2 of 8, half of the experts run at first; then their number
    falls to 2 within 115 steps, and over the last 300 of 1000 steps its mean is 2 +- 0.05."""
    for seed in range(3):
        torch.manual_seed(seed)
        taken: list[float] = []

        def note(stats: list[dict[str, Tensor]], taken: list[float] = taken) -> None:
            taken.append(float(stats[0]["num_choices_per_expert"].sum()) / 256)

        model = Net("remoe", top_k=2)
        with torch.no_grad():
            model.layers[0].router.weight.mul_(3**-0.5)  # as linear layers of torch start
        train(model, Toy(seed, zipf=True), 1000, note)
        thinner = next(step for step, k in enumerate(taken) if k < 0.9 * taken[0])
        reached = next(step for step, k in enumerate(taken) if abs(k - 2) < 0.4)
        late = torch.tensor(taken[-300:])
        assert abs(taken[0] - 4) < 1
        assert 30 < thinner < reached < 115
        assert abs(late.mean() - 2) <= 0.05
