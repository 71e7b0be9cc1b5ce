"""DynaMoE: a percentile over tokens and experts, and experts by layer."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor

from etr.methods.dynamoe import experts_of_layers, percentile
from etr.moe import MoE, RoutingContext

WORKED = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]], dtype=torch.float64)


def with_probs(probs: Tensor, text: str, **options: object) -> tuple[MoE, Tensor]:
    """A layer in float64 that gives these probabilities to the tokens."""
    count = probs.shape[1]
    layer = layer_of("dynamoe", router=f"dynamoe:{text}", num_experts=count, **options).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(count, 16))
    x = torch.zeros(len(probs), 16, dtype=torch.float64)
    x[:, :count] = probs.log()
    return layer, x


def counts(layer: MoE, x: Tensor) -> list[int]:
    """Experts of each token."""
    return decide(layer, x).routing.routing_map().sum(1).tolist()


def test_worked_choices_and_weights() -> None:
    """The pooled median of both tokens is .30: one expert, and two of .5333 and .4667."""
    layer, x = with_probs(WORKED, "quantile=0.5")
    everything = torch.ones(2, dtype=torch.bool)
    assert float(percentile(WORKED, everything, 0.5)) == pytest.approx(0.3)
    view = decide(layer, x)
    assert view.routing.expert.view(2, 3).tolist() == [[0, 3, 3], [0, 1, 3]]
    weights = view.selection.combine_weight.view(2, 3)
    want = torch.tensor([[1.0, 0, 0], [0.4 / 0.75, 0.35 / 0.75, 0]], dtype=torch.float64)
    torch.testing.assert_close(weights, want)
    learn(layer, x)
    assert float(layer.router.running.value) == pytest.approx(0.3)
    assert counts(layer.eval(), x) == [1, 2]


def test_the_percentile_is_that_of_valid_tokens() -> None:
    probs, valid = torch.rand(9, 5, dtype=torch.float64), torch.arange(9) % 3 != 1
    for q in (0.0, 0.3, 0.75, 1.0):
        want = probs[valid].flatten().quantile(q)
        torch.testing.assert_close(percentile(probs, valid, q), want)
    assert float(percentile(probs, valid & False, 0.5)) == 0
    assert float(percentile(probs[:0], valid[:0], 0.5)) == 0


def test_percentile_0_takes_all_and_1_the_best() -> None:
    probs = torch.randn(20, 4, dtype=torch.float64).softmax(-1)
    assert counts(*with_probs(probs, "quantile=0")) == [4] * 20
    assert counts(*with_probs(probs, "quantile=1")) == [1] * 20
    assert max(counts(*with_probs(probs, "quantile=0.2,most=2"))) == 2
    assert set(counts(*with_probs(probs[:1], "quantile=0.5,most=2"))) == {2}


def test_one_token_and_none_in_training_and_serving() -> None:
    for training in (True, False):
        layer, x = with_probs(WORKED, "quantile=0.5")
        for count in (0, 1):
            y = layer.train(training)(x[:count]).hidden_states
            assert y.shape == (count, 16)
            assert torch.isfinite(y).all()


def test_only_the_batchs_own_percentile_looks_ahead() -> None:
    x = torch.randn(64, 16)
    later = x.clone()
    later[32:] *= 5
    for sees, leaks in (("batch", True), ("before", False)):
        layer = layer_of("dynamoe", router=f"dynamoe:sees={sees}", num_experts=8)
        assert layer.traits.causal != leaks
        learn(layer, x)
        for training, leaks_now in ((True, leaks), (False, False)):
            maps = [
                decide(layer.train(training), tokens).routing.routing_map()[:32]
                for tokens in (x, later)
            ]
            assert torch.equal(*maps) != leaks_now


def test_the_running_mean_counts_tokens_and_stands_still_without() -> None:
    layer, x = with_probs(WORKED, "quantile=0.5")
    mask = torch.tensor([True, False])
    learn(layer, x)
    with torch.no_grad():
        layer(x[:0])
    learn(layer, x[:0])
    assert float(layer.router.running.value) == pytest.approx(0.3)
    learn(layer, x[:1])
    assert float(layer.router.running.value) == pytest.approx(0.9 * 0.3 + 0.1 * 0.2)
    found = decide(layer, x, RoutingContext(valid_mask=mask)).routing.counters["percentiles"]
    assert float(found) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        ("uniform", [8, 8, 8, 8, 8, 8]),
        ("descending", [19, 13, 8, 4, 2, 2]),
        ("ascending", [2, 2, 4, 8, 13, 19]),
        ("wave", [8, 14, 12, 4, 2, 8]),
    ],
)
def test_experts_of_layers(shape: str, want: list[int]) -> None:
    assert experts_of_layers(shape, 6, 48) == want


@pytest.mark.parametrize("shape", ["pyramid_up", "pyramid_down", "wave", "descending"])
def test_experts_of_layers_add_up(shape: str) -> None:
    for layers, total, least in ((1, 5, 1), (6, 50, 2), (5, 10, 2), (7, 64, 1)):
        found = experts_of_layers(shape, layers, total, least)
        assert (len(found), sum(found)) == (layers, total)
        assert min(found) >= least
    for arguments, words in (((shape, 6, 5), "too few"), (("flat", 6, 50), "shape='flat'")):
        with pytest.raises(ValueError, match=words):
            experts_of_layers(*arguments)


@pytest.mark.criterion
def test_unsure_tokens_take_more() -> None:
    """At the 75th percentile of 8 experts tokens take 2 +- 0.1 on average with a deviation over
    0.5, and more the less sure they are (correlation with the entropy over 0.3); a percentile of a
    token's own logits gives each token 2."""
    generator = torch.Generator().manual_seed(0)
    scale = 4 * torch.rand(2000, 1, generator=generator)
    probs = (torch.randn(2000, 8, generator=generator) * scale).double().softmax(-1)
    taken = torch.tensor(counts(*with_probs(probs, "quantile=0.75"))).double()
    entropy = -(probs * probs.log()).sum(-1)
    assert abs(taken.mean() - 2) < 0.1
    assert taken.std() > 0.5
    assert torch.corrcoef(torch.stack((taken, entropy)))[0, 1] > 0.3
    own = probs >= probs.quantile(0.75, dim=-1, keepdim=True)
    assert set(own.sum(-1).tolist()) == {2}
