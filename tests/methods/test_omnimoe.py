"""OmniMoE: product keys find the best of a grid, and atoms compute what two vectors say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor, nn
from torch.nn import functional as F

from etr.methods.omnimoe import GridScores, ProductKeys, grid_of
from etr.moe import Collector, MoE, RoutingContext, after_step, attach
from etr.moe.context import Replay, RouterInput


def small(**options: Any) -> MoE:
    """H 16, a shared expert of width 8, 4 x 4 atoms of which a token takes 3; in float64."""
    return layer_of("omnimoe", **{"num_experts": 16, "top_k": 3, **options}).double()


def grid(rows: Tensor, columns: Tensor) -> GridScores:
    return GridScores(rows.log_softmax(-1), columns.log_softmax(-1), {})


def test_worked_scores() -> None:
    """n = 3: the pairs 0, 1 and 3 with -1.09419, -1.19419 and -2.09419, weights .33481, .30295 and
    .12317."""
    scores = grid(torch.tensor([[1.0, 0, -1]]).double(), torch.tensor([[0.5, 0.4, -2]]).double())
    best = scores.best(3)
    assert best.tolist() == [[0, 1, 3]]
    gates = scores.gates_of(best)
    torch.testing.assert_close(
        gates, torch.tensor([[0.33481, 0.30295, 0.12317]]).double(), atol=5e-6, rtol=0
    )
    want = torch.tensor([[-1.09419, -1.19419, -2.09419]]).double()
    torch.testing.assert_close(gates.log(), want, atol=5e-6, rtol=0)


def best_of_table(scores: GridScores, k: int) -> list[list[int]]:
    """By sorting every pair; equal ones by number."""
    table = (scores.rows[:, :, None] + scores.columns[:, None]).flatten(1).tolist()
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in table]


def test_the_best_are_those_of_the_whole_table() -> None:
    """Also of grids that are not square, for more experts than rows, and where many are equal."""
    for shape in ((1, 5), (2, 4), (3, 3), (4, 8)):
        for k in (1, 2, 5):
            parts = [torch.randn(32, size, dtype=torch.float64) for size in shape]
            for rows, columns in (parts, [part.round() for part in parts]):
                scores = GridScores(rows, columns, {})
                assert scores.best(k).tolist() == best_of_table(scores, k)


def test_the_grid_is_the_most_square_one() -> None:
    found = {e: grid_of(e) for e in (1, 4, 7, 8, 12, 1024)}
    assert found == {1: (1, 1), 4: (2, 2), 7: (1, 7), 8: (2, 4), 12: (3, 4), 1024: (32, 32)}


def plain(layer: MoE, x: Tensor, mask: Tensor) -> Tensor:
    """The published layer: batch norm, gathered vectors, and SwiGLU, in torch's own modules."""
    router, experts = layer.router, layer.experts
    norms = [nn.BatchNorm1d(len(w), affine=False).double() for w in (router.rows, router.columns)]
    real, weights = x[mask], (router.rows, router.columns)
    lx, ly = (n(real @ w.T).log_softmax(-1) for n, w in zip(norms, weights, strict=True))
    table = (lx[:, :, None] + ly[:, None]).flatten(1)
    score, best = table.topk(layer.config.top_k)
    hidden = F.silu((experts.up_proj[best, 0] * real[:, None]).sum(-1)) * score.exp()
    gate, up = layer.shared_experts.gate_up_proj[0].chunk(2)
    shared = (F.silu(real @ gate.T) * (real @ up.T)) @ layer.shared_experts.down_proj[0].T
    y = shared + (hidden[:, :, None] * experts.down_proj[best, :, 0]).sum(1)
    return torch.zeros_like(x).index_put((mask.nonzero().squeeze(1),), y)


@pytest.mark.parametrize("backend", ["auto", "loop"])
def test_against_the_published_layer(backend: str) -> None:
    """Outputs and all gradients, also through the batch's statistics; padding counts nowhere."""
    layer, x = small(backend=backend), torch.randn(40, 16, dtype=torch.float64)
    x.requires_grad_()
    mask = torch.arange(40) % 7 != 3
    found = layer(x, RoutingContext(valid_mask=mask)).hidden_states
    want = plain(layer, x, mask)
    shared = layer.shared_experts(torch.zeros_like(x), x.dtype, lambda x, params: x)
    torch.testing.assert_close(found[mask] + shared[mask], want[mask])
    values, probe = [x, *layer.parameters()], torch.randn_like(want) * mask[:, None]
    for got, right in zip(
        torch.autograd.grad((found * probe).sum(), values),
        torch.autograd.grad((want * probe).sum(), values),
        strict=True,
    ):
        torch.testing.assert_close(got, right)


def test_running_statistics_are_those_of_batch_norm() -> None:
    """After steps of one batch as torch's module has them; of two micro-batches as of both at once;
    a single token teaches nothing, and is served by them in training too."""
    layer, other = small(), nn.BatchNorm1d(8, affine=False)
    weight = torch.cat((layer.router.rows, layer.router.columns)).detach()
    for _ in range(3):
        x = torch.randn(24, 16, dtype=torch.float64) + 1
        learn(layer, x)
        other((x @ weight.T).float())
    norm = layer.router.norm
    torch.testing.assert_close(norm.mean, other.running_mean)
    torch.testing.assert_close(norm.variance, other.running_var)

    first, second = small(), small()
    second.load_state_dict(first.state_dict())
    for part in x.split(12):
        with Collector(first):
            first(part)
    after_step(first)
    learn(second, x)
    torch.testing.assert_close(first.router.norm.variance, second.router.norm.variance)
    before = norm.mean.clone()
    one = layer(x[:1]).hidden_states
    learn(layer, x[:1])
    assert torch.equal(norm.mean, before)
    torch.testing.assert_close(layer.eval()(x[:1]).hidden_states, one)


def test_it_looks_at_the_batch_in_training_alone() -> None:
    layer = small()
    x = torch.randn(24, 16, dtype=torch.float64)
    other = torch.cat((x[:12], 3 * x[12:] + 1))
    assert not ProductKeys(norm=True).traits.causal
    assert ProductKeys().traits.causal
    for module, training, same in (
        (layer, True, False),
        (layer, False, True),
        (small(router="product_keys"), True, True),
    ):
        module.train(training)
        first, second = (decide(module, rows).selection.combine_weight[:36] for rows in (x, other))
        assert torch.equal(first, second) == same


def test_replayed_choices_have_live_weights_and_teach_the_statistics() -> None:
    layer, x = small(), torch.randn(24, 16, dtype=torch.float64)
    own = decide(layer, x)
    replay = {0: Replay(expert=own.routing.expert.view(-1, 3))}
    again = decide(layer, x, RoutingContext(replay=replay))
    assert torch.equal(again.routing.gate, own.routing.gate)
    with Collector(layer):
        layer(x, RoutingContext(replay=replay))
    after_step(layer)
    assert layer.router.norm.mean.any()


def test_no_table_of_all_experts_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and served; who asks for one gets the probabilities, which sum to 1."""
    layer, x = small(), torch.randn(24, 16, dtype=torch.float64)
    inputs = RouterInput(
        valid_mask=torch.ones(24, dtype=torch.bool),
        token_ids=None,
        token_index=None,
        step=torch.zeros(()),
        layer_index=0,
    )
    scores = layer.router.scores(x, inputs)
    torch.testing.assert_close(scores.gates.sum(-1), torch.ones(24).double())
    assert scores.logits is scores.probs is None

    def refuse(self: GridScores) -> Tensor:
        raise AssertionError("a table")

    monkeypatch.setattr(GridScores, "gates", property(refuse))
    learn(layer.train(), x)
    layer.eval()(x)


def test_atoms_are_two_vectors_whatever_the_layer_is_made_of() -> None:
    layer = small(activation="gelu", num_shared_experts=0)
    assert {name: tuple(value.shape) for name, value in layer.experts.named_parameters()} == {
        "up_proj": (16, 1, 16),
        "down_proj": (16, 16, 1),
    }
    assert layer.bank.parameters_of_a_token(3) == 3 * 2 * 16
    view = decide(layer, torch.randn(5, 16, dtype=torch.float64))
    assert layer.backend_for(view.routing, view.selection).name == "by_row"
    layer.reconfigure(backend="loop")
    assert layer.backend_for(view.routing, view.selection).name == "loop"


def test_options_are_checked() -> None:
    for momentum in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"momentum={momentum} must lie in \(0, 1\]"):
            ProductKeys(momentum=momentum)
    with pytest.raises(ValueError, match="no scores to add to"):
        small(local_bonus=0.1)
    delta = {0: torch.zeros(16)}
    with pytest.raises(ValueError, match="is not made of its logits alone"):
        small()(torch.randn(4, 16).double(), RoutingContext(logit_delta=delta))


H, CENTRES = 24, 200


class Rules:
    """Many rare rules: tokens lie near 200 centres N(0, I), each of which has a target N(0, I)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.centres, self.targets = torch.randn(2, CENTRES, H, generator=generator)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        which = torch.randint(CENTRES, (count,))
        return self.centres[which] + 0.1 * torch.randn(count, H), self.targets[which]

    def error_of(self, model: nn.Module, found: Callable[[Tensor], Tensor]) -> float:
        """Mean squared error on 2048 fresh tokens after 500 steps of Adam on 256."""
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        if isinstance(model, MoE):
            attach(model, optimizer, 500)
        for _ in range(500):
            x, want = self.draw(256)
            loss = F.mse_loss(found(x), want)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        torch.manual_seed(9)
        x, want = self.draw(2048)
        with torch.no_grad():
            return float(F.mse_loss(found(x), want))


@pytest.mark.measured
@pytest.mark.criterion
def test_atoms_learn_many_rules() -> None:
    """The 16 best of 32 x 32 experts are those of the whole table. 256 atoms, 8 a token, beside a
    small shared expert reach at most a quarter of the error of a feed-forward of as many active
    parameters, and use at least 90 % of the atoms."""
    scores = grid(*torch.randn(2, 512, 32, dtype=torch.float64))
    assert scores.best(16).tolist() == best_of_table(scores, 16)

    rules, sizes = Rules(), {"hidden_size": H, "intermediate_size": 16, "activation": "silu"}
    torch.manual_seed(0)
    layer = layer_of("omnimoe", num_experts=256, **sizes)
    nn.init.normal_(layer.experts.up_proj)
    nn.init.normal_(layer.experts.down_proj, std=0.1)
    dense = nn.Sequential(nn.Linear(H, 40), nn.SiLU(), nn.Linear(40, H))
    found = rules.error_of(layer, lambda x: layer(x).hidden_states)
    assert found <= 0.25 * rules.error_of(dense, dense)
    chosen = decide(layer, rules.draw(2048)[0]).routing.expert
    assert len(chosen.unique()) >= 0.9 * 256
