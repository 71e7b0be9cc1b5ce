"""Expert-router coupling: what an expert answers, and what it should not."""

from __future__ import annotations

import math

import pytest
import torch
from decisions import layer_of, learn
from torch import Tensor

from etr.methods.router_coupling import RouterCoupling, _noise, coupling, reach
from etr.moe import Collector, MoE, after_step

pytestmark = pytest.mark.filterwarnings("ignore:MoE layers train")


def layer_with(alpha: float = 0.5, **options: object) -> MoE:
    layer = layer_of(
        "router_coupling", losses=(RouterCoupling(weight=1.0, alpha=alpha),), **options
    )
    return layer.double()


def loss_of(layer: MoE, num_tokens: int = 5) -> Tensor:
    x = torch.randn(num_tokens, layer.config.hidden_size).double()
    return layer(x).losses["router_coupling"]


@pytest.mark.criterion
def test_no_answer_exceeds_its_share() -> None:
    """The loss is 0 where no answer exceeds alpha times the expert's own, and 0.75 for 4 experts
    that answer every row alike at alpha = 0.5; it is the same for every batch, and training on it
    alone lowers it, at alpha = 0.5 and at 1."""
    answers = torch.full((4, 4), 0.5).double() + 0.5 * torch.eye(4)
    assert coupling(answers, 0.5) == 0
    answers[2, 1] += 0.1  # beside expert 2's own row, and beside expert 1's
    assert coupling(answers, 0.5).item() == pytest.approx(0.2 / 16)
    assert coupling(torch.ones(4, 4), 0.5) == 0.75

    for alpha in (0.5, 1.0):
        layer = layer_with(alpha)
        found = {loss_of(layer, num_tokens).item() for num_tokens in (0, 1, 5, 64)}
        assert len(found) == 1
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            with Collector(layer):
                loss = loss_of(layer)
            loss.backward()
            optimizer.step()
            after_step(layer)  # another perturbation
        assert loss_of(layer).item() < found.pop()


def test_by_hand() -> None:
    """Of M = [[1, .8], [.4, 2]] only .8 exceeds half of M_00; [3, 4] and [0, 4] are 3 apart."""
    answers = torch.tensor([[1, 0.8], [0.4, 2]], dtype=torch.float64)
    assert coupling(answers, 0.5).item() == pytest.approx(0.075)
    rows = torch.tensor([[3.0, 4.0], [0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(reach(rows), torch.tensor([0.3, 0.375]).double())


def test_one_expert_zero_rows_and_equal_rows() -> None:
    assert torch.equal(reach(torch.ones(1, 3)), torch.zeros(1))
    assert coupling(torch.ones(1, 1), 0.5) == 0
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]], dtype=torch.float64).requires_grad_()
    assert reach(rows).tolist() == [0, 0, 0]
    layer = layer_with(num_experts=1)
    assert loss_of(layer) == 0
    layer = layer_with()
    with torch.no_grad():
        layer.router.weight[0] = 0
        layer.router.weight[1] = layer.router.weight[2]
    for value in torch.autograd.grad(
        loss_of(layer), (layer.router.weight, layer.experts.gate_up_proj)
    ):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize(
    "router", ["token_choice", "etr", "etr_paper", "etr:frame=learned", "locmoe"]
)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_value_and_gradients_are_those_of_plain_loops(router: str, activation: str) -> None:
    """Of rows and of gates, or of first projections where there are no gates."""
    layer = layer_of(
        "router_coupling",
        router=router,
        activation=activation,
        losses=(RouterCoupling(weight=1.0, alpha=0.6),),
    ).double()
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # no two rows are equally far
    (row,) = layer.loss_rows()
    up = layer.experts.get_parameter(layer.experts.up_name)
    rows = layer.router.directions(torch.float64)
    # Each component moves by at most this share, within half the way to the nearest other row.
    bound = torch.stack(
        [
            min((rows[i] - rows[j]).norm() for j in range(4) if j != i) / (2 * rows[i].norm())
            for i in range(4)
        ]
    )
    torch.testing.assert_close(reach(rows), bound)
    moved = rows * (1 + _noise(rows, 0, 0) * bound[:, None])
    want, gate = rows.new_zeros(()), up[:, :8]
    answer = [[(gate[j] @ moved[i]).square().sum().sqrt() for j in range(4)] for i in range(4)]
    for i in range(4):
        for j in range(4):
            if i != j:
                for value in (answer[i][j], answer[j][i]):
                    want = want + (value - row.alpha * answer[i][i]).clamp_min(0) / 16
    found = loss_of(layer)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)
    leaves = [up, *layer.router.parameters()]
    grads = [torch.autograd.grad(v, leaves, allow_unused=True) for v in (found, want)]
    for got, expected in zip(*grads, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


def test_the_perturbation_is_of_the_step_and_the_layer() -> None:
    layer = layer_with()
    first = loss_of(layer).item()
    assert loss_of(layer).item() == first
    other = MoE(layer.config, layer_index=1).double()
    other.load_state_dict(layer.state_dict())
    assert loss_of(other).item() != first
    learn(layer, torch.randn(4, 16).double())
    assert loss_of(layer).item() != first
    noise = _noise(torch.zeros(64, 256), 3, 1)
    assert -1 <= noise.min() < -0.999
    assert 0.999 < noise.max() < 1
    assert abs(noise.mean()) < 0.02
    assert abs(noise.var() - 1 / 3) < 0.01


def test_null_experts_have_no_answer() -> None:
    plain, nulls = layer_with(), layer_with(experts="nulls:count=2")
    with torch.no_grad():
        nulls.router.weight[:4] = plain.router.weight
        nulls.experts.gate_up_proj.copy_(plain.experts.gate_up_proj)
    assert torch.equal(loss_of(nulls), loss_of(plain))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha=-1 of loss 'router_coupling' must be >= 0"):
        RouterCoupling(alpha=-1)
    with pytest.raises(ValueError, match="router 'hash' has no directions of experts"):
        layer_of("hash", losses="router_coupling:weight=1")
    with pytest.raises(ValueError, match="experts of one width"):
        layer_with(experts="widths:widths=2x8+2x4")
    assert math.isfinite(loss_of(layer_with(alpha=0)).item())
