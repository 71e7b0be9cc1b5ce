"""X-MoE: cosines of few dimensions; two temperatures, one learned."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of
from torch import Tensor, nn
from toys import H, Net, Toy, error, train

from etr.moe import MoE, RoutingContext

S = torch.tensor([0.6, 0.8, -0.6])  # cosines of (3, 4) with (1, 0), (0, 2), (-1, 0)


def worked(gate: str, **options: object) -> tuple[MoE, Tensor]:
    """Three experts, and one token whose projection is (3, 4)."""
    layer = layer_of("x_moe", router=f"x_moe:gate={gate},dimensions=2", num_experts=3, **options)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2, 16))
        layer.router.embedding.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]))
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, :2] = torch.tensor([3.0, 4.0])
    return layer.double(), x


def rank_of_gradient(layer: MoE) -> int:
    """Rank of what routing sends into 256 tokens."""
    x = torch.randn(256, layer.config.hidden_size, dtype=torch.float64, requires_grad=True)
    routing, _ = layer.double().route(x, RoutingContext())
    (routing.probs * torch.randn_like(routing.probs)).sum().backward()
    assert x.grad is not None
    return int(torch.linalg.matrix_rank(x.grad, rtol=1e-4))


@pytest.mark.criterion
def test_length_and_rank() -> None:
    """A token and 7 times that token, and an expert's embedding and 5 times that, have the same
    cosines within 1e-6; the gradient that routing sends into tokens has rank <= E / 2, where a
    linear router's has E - 1."""
    layer, x = layer_of("x_moe", num_experts=8), torch.randn(256, 16)
    cosine = layer.router.affinity(x)
    assert (layer.router.affinity(7 * x) - cosine).abs().max() < 1e-6
    with torch.no_grad():
        layer.router.embedding[0] *= 5
    assert (layer.router.affinity(x) - cosine).abs().max() < 1e-6
    linear = layer_of("token_choice", num_experts=8, capacity="none")
    assert rank_of_gradient(layer) == 4
    assert rank_of_gradient(linear) == 7


@pytest.mark.parametrize(
    ("gate", "fixed", "gates"),
    [
        ("softmax", 0.3, [0.33715, 0.65668, 0.00618]),
        ("sigmoid", 0.07, [0.99981, 0.99999, 0.00019]),
    ],
)
def test_worked_gates(gate: str, fixed: float, gates: list[float]) -> None:
    layer, x = worked(gate, top_k=3)
    view = decide(layer, x)
    scores = layer.router.affinity(x)
    torch.testing.assert_close(scores[0], S.double())
    assert layer.router.log_temperature.exp().item() == pytest.approx(fixed)
    found = torch.zeros(3, dtype=torch.float64).scatter(0, view.routing.expert, view.routing.gate)
    assert found.tolist() == pytest.approx(gates, abs=6e-6)
    torch.testing.assert_close(view.routing.probs[0], (S.double() / fixed).softmax(-1))


def test_the_balance_loss_keeps_its_own_temperature() -> None:
    """A sigmoid at 0.3 gives .88080, .93503, .11920; its balance table stays that of 0.07."""
    layer, x = worked("sigmoid", top_k=3)
    with torch.no_grad():
        layer.router.log_temperature.copy_(torch.tensor([0.3]).log())
    view = decide(layer, x)
    found = torch.zeros(3, dtype=torch.float64).scatter(0, view.routing.expert, view.routing.gate)
    assert found.tolist() == pytest.approx([0.88080, 0.93503, 0.11920], abs=6e-6)
    assert view.routing.probs[0].tolist() == pytest.approx([0.05431, 0.94569, 0.0], abs=6e-6)


def test_against_plain_loops() -> None:
    """Gates and their gradients, in float64."""
    layer = layer_of("x_moe", num_experts=6, top_k=6).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    found = decide(layer, x).routing
    w, e = layer.router.weight, layer.router.embedding
    tau = layer.router.log_temperature.exp()[0]
    rows = []
    for token in x:
        z = w @ token
        cosines = torch.stack([(z * row).sum() / (z.norm() * row.norm()) for row in e])
        exps = (cosines / tau).exp()
        rows.append(exps / exps.sum())
    want = torch.stack(rows)[found.token, found.expert]
    torch.testing.assert_close(found.gate, want)
    weight, values = torch.randn_like(want), list(layer.router.parameters())
    for got, right in zip(
        torch.autograd.grad((found.gate * weight).sum(), values),
        torch.autograd.grad((want * weight).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_one_expert_has_one_dimension() -> None:
    layer = layer_of("x_moe", num_experts=1)
    assert layer.router.weight.shape == (1, 16)
    assert decide(layer, torch.zeros(2, 16)).routing.gate.tolist() == [1.0, 1.0]  # and no NaN


@pytest.mark.parametrize("option", ["dimensions=0", "temperature=0", "gate=relu"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        layer_of("x_moe", router=f"x_moe:{option}")


class Encoded(Net):
    """An encoder before the layer, through which routing sends a gradient; both residual."""

    def __init__(self) -> None:
        super().__init__("x_moe")
        self.encoder = nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, H))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        h = x + self.encoder(x)
        y, loss = super().forward(h)
        return h + y, loss


@pytest.mark.measured
@pytest.mark.criterion
def test_without_norms_it_learns_less() -> None:
    """Clustered regression, top-1, 800 steps, 4 seeds: the error with both norms is below that of
    plain products of few dimensions in each."""
    for seed in range(4):
        found = []
        for norms in (True, False):
            torch.manual_seed(seed)
            model = Encoded()
            if not norms:
                router = model.layers[0].router
                router.affinity = lambda x, r=router: x @ r.weight.T @ r.embedding.T
            train(model, Toy(seed), 800)
            found.append(error(model, Toy(seed)))
        assert found[0] < found[1], (seed, found)
