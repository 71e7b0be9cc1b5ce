"""Progressive sparsification: more experts at first, and what a balance loss does not see."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decisions import decide, layer_of
from torch import Tensor, nn
from torch.nn import functional as F

from etr.methods import METHODS
from etr.methods.sigma_moe import Sparsified
from etr.moe import Collector, MoE, MoEConfig, RoutingContext, attach, moe_layers, set_progress
from etr.moe.losses.balance import balance_loss
from etr.moe.stats import max_violation


def lower(**options: object) -> MoE:
    """A layer of 16 experts that starts with 8."""
    return layer_of("sigma_moe", num_experts=16, **options).double()


def taken(layer: MoE) -> int:
    """Experts of each token."""
    counts = decide(layer, torch.randn(9, 16, dtype=torch.float64)).routing.routing_map().sum(1)
    (count,) = set(counts.tolist())
    return count


def test_the_number_steps_down() -> None:
    layer, seen = lower(), []
    for progress in (0.0, 0.124, 0.126, 0.26, 0.374, 0.376, 0.5, 1.0):
        set_progress(layer, progress)
        seen.append(taken(layer))
    assert seen == [8, 8, 4, 2, 2, 1, 1, 1]
    assert Sparsified(start=8).stages(16, 3) == [8, 4, 3]
    assert Sparsified(start=8).stages(4, 1) == [4, 2, 1]
    assert Sparsified(start=1).stages(16, 4) == [4]


def test_only_the_first_layers_do_and_what_was_saved_goes_on() -> None:
    layer = lower()
    upper = MoE(layer.config, 8).double()
    assert (taken(layer), taken(upper)) == (8, 1)
    steps = MoE(lower(router="sparsified:lower=2", inner_steps=2).config, 1).double()
    x = torch.randn(9, 16, dtype=torch.float64)
    maps = [step.route(x, RoutingContext())[0].routing_map() for step in moe_layers(steps)]
    assert [int(table.sum()) for table in maps] == [72, 72]  # inner steps are of their layer
    set_progress(layer, 0.2)
    other = lower()
    other.load_state_dict(layer.state_dict())
    assert taken(other.eval()) == 4


def test_weights_are_shares_and_the_sum_has_no_gradient() -> None:
    """Against plain loops, values and gradients; at one expert the weight is 1."""
    layer, x = lower(), torch.randn(5, 16, dtype=torch.float64)
    for progress, k in ((0.3, 2), (1.0, 1)):
        set_progress(layer, progress)
        view = decide(layer, x)
        rows = []
        for token in x:
            logits = layer.router.weight @ token
            p = logits.exp() / logits.exp().sum()
            best = sorted(range(16), key=lambda e: -float(p[e].detach()))[:k]
            total = sum(float(p[e].detach()) for e in best)
            rows.append(torch.stack([p[e] / total for e in best]))
        want = torch.stack(rows)
        found = view.selection.combine_weight.view(5, -1)
        torch.testing.assert_close(found[:, :k], want)
        assert not found[:, k:].any()
        probe = torch.randn_like(want)
        (got,) = torch.autograd.grad((found[:, :k] * probe).sum(), layer.router.weight)
        (right,) = torch.autograd.grad((want * probe).sum(), layer.router.weight)
        torch.testing.assert_close(got, right)
    torch.testing.assert_close(found[:, 0], torch.ones(5, dtype=torch.float64))


def test_a_constant_schedule_is_token_choice_bit_for_bit() -> None:
    x = torch.randn(32, 16)
    for top_k in (1, 2):
        layer = layer_of("sigma_moe", router="sparsified", top_k=top_k)
        plain = layer_of("token_choice", top_k=top_k, capacity="none")
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x).hidden_states, plain(x).hidden_states)


def balance_of(logits: Tensor, gain: float) -> tuple[float, float]:
    """Balance loss at the choices of the logits, with probabilities of gain * logits; MaxVio."""
    layer = layer_of("sigma_moe", num_experts=logits.shape[1], top_k=1, router="sparsified")
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(logits.shape[1], 16))
    x = torch.zeros(len(logits), 16)
    x[:, : logits.shape[1]] = logits
    routing = decide(layer, x).routing
    load = routing.num_choices_per_expert()
    flat = dataclasses.replace(routing, probs=(gain * logits).softmax(-1))
    return float(balance_loss(flat, load)), float(max_violation(load))


def test_the_balance_loss_is_blind_to_flat_probabilities() -> None:
    """Worked values, and 4096 x 16 logits: the loss falls to 1 while MaxVio stays at 1.82."""
    logits = torch.tensor([[3.0, 1], [2, 0], [2, 1], [0, 1]])
    found = [balance_of(logits, gain)[0] for gain in (1, 0.1, 0)]
    assert found == pytest.approx([1.19040, 1.02492, 1.0], abs=5e-6)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 16, generator=generator) + torch.linspace(1.5, 0, 16)
    pairs = [balance_of(logits, gain) for gain in (1, 0.3, 0.1, 0.01)]
    assert [loss for loss, _ in pairs] == pytest.approx([1.347, 1.111, 1.037, 1.004], abs=6e-4)
    assert [violation for _, violation in pairs] == pytest.approx([1.82] * 4, abs=6e-3)


@pytest.mark.parametrize("text", ["lower=-1", "start=0", "until=0", "until=2"])
def test_options_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        layer_of("sigma_moe", router=f"sparsified:{text}")


class Two(nn.Module):
    """Two residual layers of 24 experts; the first may step down."""

    def __init__(self, text: str) -> None:
        super().__init__()
        options = {
            **METHODS["sigma_moe"].config_options(),
            "router": text,
            "losses": "balance:weight=0.6",  # the mean of two layers counts as their sum at 0.3
        }
        sizes = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 24, "top_k": 1}
        config = MoEConfig(**{**sizes, **options})
        self.layers = nn.ModuleList(MoE(config, place) for place in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        with Collector(self) as collector:
            for layer in self.layers:
                x = x + layer(x).hidden_states
        return x, collector.loss()


def final_loss(seed: int, text: str, steps: int = 260) -> float:
    """Mean squared error of the last 50 steps; clusters of frequency 1 / rank."""
    task = torch.Generator().manual_seed(3)
    centres = torch.randn(48, 16, generator=task) * 0.7 + 1.2
    targets, weights = torch.randn(48, 16, generator=task), 1 / torch.arange(1.0, 49.0)
    torch.manual_seed(seed)
    model = Two(text)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attached, found = attach(model, optimizer, steps), []
    for _ in range(steps):
        cluster = torch.multinomial(weights, 128, True)
        y, losses = model(centres[cluster] + 0.5 * torch.randn(128, 16))
        loss = F.mse_loss(y, targets[cluster])
        optimizer.zero_grad()
        (loss + losses).backward()
        optimizer.step()
        found.append(float(loss.detach()))
    attached.detach()
    return sum(found[-50:]) / 50


@pytest.mark.measured
@pytest.mark.criterion
def test_stepping_down_ends_lower() -> None:
    """On clustered tokens, two layers of 24 experts and a balance loss of weight 0.3, a first layer
    that steps from 8 experts to 1 ends with a loss at least 0.02 below that of 1 from the start, as
    the mean of 3 seeds."""
    plain, stepped = (
        [final_loss(seed, f"sparsified:lower=1,start={start}") for seed in range(3)]
        for start in (1, 8)
    )
    assert sum(stepped) / 3 <= sum(plain) / 3 - 0.02
