"""Every loss of the table: its gradient, what splits and rows leave alone, and a row of one's own.

A new row in `LOSSES` is tested without a change here. That ranks average to the loss of one rank is
held in tests/distributed, by every row too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cells import H, I, T, context, tokens, variants
from torch import Tensor
from torch.func import functional_call

from etr.moe import (
    LOSSES,
    ROUTERS,
    Collector,
    ExpertPlacement,
    LossConfig,
    MoE,
    MoEConfig,
    after_step,
    attach,
)
from etr.moe.learner import learners_in
from etr.moe.losses import Loss, LossInput, mean_over_valid, whole_over_group
from etr.moe.routers import RouterTraits

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers train")

E = 4
PLACEMENT = ExpertPlacement(rank_of_expert=(0, 0, 1, 1), node_of_rank=(0, 1))
ROWS = [
    row
    for name in LOSSES
    for row in (LOSSES[name](weight=0.5), *variants(LOSSES[name](weight=0.5)))
]
each_row = pytest.mark.parametrize("row", ROWS, ids=str)


def config(losses: Any, router: str = "token_choice", **options: Any) -> MoEConfig:
    sizes = {"hidden_size": H, "intermediate_size": I, "num_experts": E}
    return MoEConfig(**{**sizes, "router": router, "losses": losses, **options})


def router_of(losses: Any) -> str:
    """The first router, token choice before all, that has what losses need."""
    rows = losses if isinstance(losses, tuple) else ()
    names = ("token_choice", *ROUTERS)
    return next(n for n in names if not any(row.lacks(ROUTERS[n]().traits) for row in rows))


def layer_of(losses: Any, **options: Any) -> MoE:
    torch.manual_seed(4)
    router = router_of(losses)
    return MoE(config(losses, router, capacity="none", top_k=2, **options)).double()


def loss_of(layer: MoE, x: Tensor, **fields: Any) -> Tensor:
    (loss,) = layer(x, context(len(x), placement=PLACEMENT, **fields)).losses.values()
    return loss


def batches() -> tuple[Tensor, Tensor]:
    """Two that lean to other experts."""
    first, second = tokens().chunk(2)
    second = second.clone()
    second[:, 3 * H // E :] += 1.0
    return first, second


def weights_of(layer: MoE) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in layer.named_parameters()}


@each_row
def test_gradient(row: Loss) -> None:
    """Of tokens, router and experts, against differences."""
    layer, x = layer_of((row,)), tokens(5).requires_grad_()
    given = {"router.weight": weights_of(layer)["router.weight"].requires_grad_()}

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        arguments = (x, context(5, placement=PLACEMENT))
        (found,) = functional_call(layer, {"router.weight": weight}, arguments).losses.values()
        return found

    assert torch.autograd.gradcheck(loss, (x, given["router.weight"]))


@each_row
def test_equal_parts_of_a_batch_average_to_it_where_the_loss_says_so(row: Loss) -> None:
    """Value and gradient."""
    parts = batches()
    found = []
    for split in ((torch.cat(parts),), parts):
        layer = layer_of((row,))
        total = sum(loss_of(layer, x) for x in split) / len(split)
        assert isinstance(total, Tensor)
        total.backward()
        found.append((total.detach(), layer.router.get_parameter("weight").grad))
    (whole, gradient), (mean, other) = found
    assert torch.allclose(whole, mean, rtol=1e-9) == row.is_mean
    assert torch.allclose(gradient, other, rtol=1e-7, atol=1e-12) == row.is_mean


@each_row
def test_the_step_before_counts_where_the_loss_says_so(row: Loss) -> None:
    layer, (before, x) = layer_of((row,)), batches()
    fresh = loss_of(layer, x).detach()
    with Collector(layer):
        loss_of(layer, before)
    after_step(layer)
    assert torch.equal(loss_of(layer, x), fresh) != row.needs_past
    if not any(learner.moves for learner in learners_in(layer.router)):
        assert layer.learns_from_steps() == row.needs_past


@each_row
def test_earlier_micro_batches_count_in_mode_running_alone(row: Loss) -> None:
    layer, (before, x) = layer_of((row,)), batches()
    fresh = loss_of(layer, x).detach()
    with Collector(layer):
        loss_of(layer, before)
    with Collector(layer):
        again = loss_of(layer, x).detach()
    assert torch.equal(again, fresh) != (getattr(row, "mode", None) == "running")


@each_row
def test_padding_counts_for_nothing(row: Loss) -> None:
    layer, x = layer_of((row,)), tokens()
    padded = torch.cat([x, torch.full((3, H), torch.nan, dtype=x.dtype)])
    mask = torch.arange(len(padded)) < len(x)
    torch.testing.assert_close(loss_of(layer, padded, valid_mask=mask), loss_of(layer, x))


@each_row
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(row: Loss, num_tokens: int) -> None:
    layer = layer_of((row,))
    loss = loss_of(layer, tokens(num_tokens))
    loss.backward()
    gradient = layer.router.get_parameter("weight").grad
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    moved = row.needs_experts or (num_tokens == 1 and not row.needs_past)  # weights are there
    assert bool(gradient.abs().max() > 1e-12) == moved


@each_row
def test_it_is_scaled_by_its_weight_and_left_out_at_0(row: Loss) -> None:
    x, at = tokens(), context(placement=PLACEMENT)
    losses = {
        weight: layer_of((dataclasses.replace(row, weight=weight),))(x, at).losses
        for weight in (1.0, 0.25, 0.0)
    }
    assert losses[0.0] == {}
    assert losses[1.0].keys() == {row.label}
    torch.testing.assert_close(losses[0.25][row.label], 0.25 * losses[1.0][row.label])


@each_row
def test_what_is_1_when_even_is(row: Loss) -> None:
    """Of a router without a preference; and more where all go to one expert."""
    layer, x = layer_of((dataclasses.replace(row, weight=1.0),), num_experts=E), tokens().abs()
    weight = layer.router.get_parameter("weight")
    with torch.no_grad():
        weight.zero_()
    even = float(loss_of(layer, x).detach())
    assert (abs(even - 1) < 1e-12) == row.one_when_even
    if row.one_when_even and not row.needs_past:
        with torch.no_grad():
            weight[0] = 1.0
        assert float(loss_of(layer, x).detach()) > 1.5


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_router_without_what_it_needs_is_refused_by_name(name: str, router: str) -> None:
    """With a weight. Without one the loss is left out."""
    traits = ROUTERS[router]().traits
    missing = [fact for fact in LOSSES[name].needs if not getattr(traits, fact)]
    if missing:
        with pytest.raises(ValueError, match=rf"losses: {name}:weight=0\.5: .*router '{router}' "):
            config(f"{name}:weight=0.5", router)
    else:
        config(f"{name}:weight=0.5", router)
    assert (config(name, router).loss_weights[name] == 0) == bool(missing or name == "locality")


def test_needs_are_facts_of_routers() -> None:
    for row in LOSSES.values():
        assert all(hasattr(RouterTraits(), fact) for fact in row.needs)


# --- a row of one's own ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Coupling(Loss):
    """How much less an expert answers to its own direction than to that of others.

    Directions are the router's, pulled a little to the mean token.
    """

    name = "coupling"
    needs = ("has_probs",)
    needs_tokens = True
    needs_experts = True

    pull: float = 0.1
    """Share of the mean token in a direction."""

    def __call__(self, given: LossInput) -> Tensor:
        assert given.experts is not None
        weight = given.router.weight.to(given.experts.up)
        if self.pull:
            assert given.x is not None
            weight = weight + self.pull * mean_over_valid(given.x.to(weight), given.routing, None)
        answers = torch.einsum("eih,dh->ed", given.experts.up, weight).square()
        own = answers.diagonal(given.first_expert)[: len(answers)]
        return whole_over_group((answers.mean(1) - own).sum(), given.expert_group)


@dataclass(frozen=True, kw_only=True)
class OwnCoupling(Coupling):
    """The same without tokens, which ranks that divide the experts can compute."""

    name = "own_coupling"
    needs_tokens = False
    pull: float = 0.0


def test_its_gradient() -> None:
    test_gradient(Coupling(weight=0.5))


@pytest.fixture
def coupling() -> Iterator[type[Loss]]:
    LOSSES.add(Coupling)
    yield Coupling
    del LOSSES["coupling"]


@pytest.mark.usefixtures("coupling")
def test_a_new_loss_trains_by_a_text_option_with_tokens_and_experts() -> None:
    text = "balance:mode=running,weight=0.1,coupling:weight=0.01,pull=0.2"
    layer, x = layer_of(text), tokens().requires_grad_()
    losses = layer(x).losses
    assert losses.keys() == {"aux", "coupling"}
    leaves = [x, layer.experts.gate_up_proj, layer.router.get_parameter("weight")]
    assert all(g.any() for g in torch.autograd.grad(losses["coupling"], leaves))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attachment = attach(layer, optimizer, total_steps=9)
    values = []
    for _ in range(9):
        loss = layer(x.detach()).losses["coupling"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
        assert float(attachment.last_stats[0]["loss_coupling"]) == values[-1]
    assert values[-1] < values[0] - 0.01
    assert MoEConfig.from_dict(layer.config.to_dict()).loss_rows == layer.config.loss_rows


@pytest.mark.usefixtures("coupling")
def test_weights_and_gradients_of_such_a_loss_are_float32_under_autocast() -> None:
    layer, x = layer_of("coupling:weight=0.5").float(), tokens().float()
    expected = layer(x).losses["coupling"]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x).losses["coupling"]
    assert torch.equal(found, expected)


def test_names_weights_and_texts_are_checked(coupling: type[Loss]) -> None:
    with pytest.raises(ValueError, match=r"loss 'coupling' is taken by .*Coupling"):
        LOSSES.add(coupling)
    for text, message in {
        "coupling": "loss 'coupling' needs a weight, as in coupling:weight=0.01",
        "evenness:weight=1": "loss='evenness' is unknown; choose one of balance, z, locality",
        "balance:wait=1": "loss 'balance' has no option wait; it has weight, mode",
        "balance,z,balance": "losses name 'aux' 2 times",
        "balance:weight=-1": "weight=-1 of loss 'balance' must be >= 0",
        "balance:mode=all": "mode='all' must be one of micro, ranks, running, previous",
        "weight=1": "loss='weight=1' is unknown",
    }.items():
        for kind in (lambda text: LossConfig(losses=text), config):
            with pytest.raises(ValueError, match=message):
                kind(text)
    with pytest.raises(ValueError, match=r"aux_alpha=0\.1 beside it would be ignored"):
        LossConfig(losses="balance", aux_alpha=0.1)
    assert config("").loss_rows == ()


def test_flat_options_and_texts_mean_the_same() -> None:
    flat = LossConfig(aux_alpha=0.2, aux_mode="running", z_beta=0.1, locality_mu=0.3)
    text = "balance:weight=0.2,mode=running,z:weight=0.1,locality:weight=0.3"
    assert config(flat).loss_rows == config(text).loss_rows
    assert config(LossConfig(losses=text)).loss_rows == config(text).loss_rows
    x, at = tokens(T), context(placement=PLACEMENT)
    one, other = layer_of(flat)(x, at).losses, layer_of(text)(x, at).losses
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
