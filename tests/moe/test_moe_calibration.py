"""Thresholds keep on fresh tokens the share that training kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from etr.moe import Collector, MoE, MoEConfig, RoutingContext, after_step
from etr.moe.calibration import Calibration, score_histogram
from etr.moe.capacity import Factor
from etr.moe.routing import Routing
from etr.moe.score_scale import NUM_BINS, CosineScale, OddsScale, ScoreScale
from etr.moe.select import token_pairs
from etr.moe.topology import ExpertPlacement

N = 100_000
Sampler = Callable[[int], Tensor]


def chosen_cosines(hidden_size: int, signal: float) -> Sampler:
    """Best of 8 cosines of tokens that lean by `signal` standard deviations to one expert."""

    def sample(n: int) -> Tensor:
        table = torch.randn(n, 8)
        table[:, 0] += signal
        return (table / hidden_size**0.5).amax(-1).clamp(-1, 1)

    return sample


COSINES: dict[str, Callable[[int], Sampler]] = {
    "chance": lambda h: chosen_cosines(h, 0.0),
    "aligned": lambda h: chosen_cosines(h, 3.0),
    "medium": lambda h: lambda n: (0.3 + 0.1 * torch.randn(n)).clamp(-1, 1),
    "wide": lambda h: lambda n: torch.rand(n) * 2 - 1,
    "two clusters": lambda h: (
        lambda n: torch.cat(
            [torch.randn(n // 2) / h**0.5, 0.5 + 0.1 * torch.randn(n - n // 2)]
        ).clamp(-1, 1)
    ),
    "correlated": lambda h: lambda n: (0.8 + 0.03 * torch.randn(n)).clamp(-1, 1),
}


def softmax_scores(deviation: float, best: bool) -> Callable[[int], Sampler]:
    """Probabilities from logits of a standard deviation: of each token's best expert, or of one."""

    def of_experts(num_experts: int) -> Sampler:
        def sample(n: int) -> Tensor:
            probs = (deviation * torch.randn(n, num_experts)).softmax(-1)
            return probs.amax(-1) if best else probs[:, 0]

        return sample

    return of_experts


PROBS: dict[str, Callable[[int], Sampler]] = {
    "vague, best": softmax_scores(0.5, best=True),
    "soft, best": softmax_scores(1.0, best=True),
    "sharp, best": softmax_scores(3.0, best=True),
    "saturated, best": softmax_scores(6.0, best=True),
    "soft, any": softmax_scores(1.0, best=False),
    "sharp, any": softmax_scores(3.0, best=False),
    "sigmoid, best": lambda e: lambda n: (3 * torch.randn(n, e)).sigmoid().amax(-1),
}


def calibrated(scores: Tensor, share: float, scale: ScoreScale) -> Calibration:
    calibration = Calibration(1, scale)
    histogram = torch.bincount(calibration.scale.bin(scores), minlength=NUM_BINS)[None]
    calibration.update(histogram, torch.tensor([round(share * len(scores))]))
    return calibration


def share_above(scores: Tensor, calibration: Calibration) -> float:
    return float((scores >= calibration.threshold[0]).double().mean())


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("hidden_size", [64, 512, 4096])
@pytest.mark.parametrize("name", list(COSINES))
def test_the_kept_share_of_cosines_carries_over(name: str, hidden_size: int, share: float) -> None:
    sample = COSINES[name](hidden_size)
    calibration = calibrated(sample(N), share, CosineScale(hidden_size))
    assert share_above(sample(N), calibration) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("num_experts", [4, 64])
@pytest.mark.parametrize("name", list(PROBS))
def test_the_kept_share_of_probabilities_carries_over(
    name: str, num_experts: int, share: float
) -> None:
    sample = PROBS[name](num_experts)
    calibration = calibrated(sample(N), share, OddsScale(1 / num_experts))
    assert share_above(sample(N), calibration) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("hidden_size", [1, 16, 4096])
def test_bins_of_cosines_cover_the_range_and_invert(hidden_size: int) -> None:
    scale = CosineScale(hidden_size)
    edges = scale.edges()
    assert len(edges) == NUM_BINS + 1
    assert edges[[0, NUM_BINS // 2, -1]].tolist() == pytest.approx([-1, 0, 1])
    assert_bins_invert(scale)
    score = torch.linspace(-1, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(scale.score(scale.coordinate(score)), score, atol=2e-3, rtol=0)
    assert scale.bin(torch.tensor([-1.1, -1.0, 1.0, 1.1])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("chance", [0.5, 1 / 8, 1 / 256, 1.0])
def test_bins_of_probabilities_cover_the_range_and_invert(chance: float) -> None:
    scale = OddsScale(chance)
    assert float(scale.edges()[0]) < 1e-6
    assert float(scale.edges()[-1]) > 1 - 1e-6
    assert_bins_invert(scale)
    score = torch.tensor([1e-5, 0.01, 0.3, 0.5, 0.99, 1 - 1e-6], dtype=torch.float64)
    torch.testing.assert_close(scale.score(scale.coordinate(score)), score)
    found = scale.bin(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    assert found[0] == found[1] < NUM_BINS // 8
    assert found[2] == found[3] > NUM_BINS * 7 // 8


def assert_bins_invert(scale: ScoreScale) -> None:
    middle = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS
    inside = (scale.score(middle) > 1e-11) & (scale.score(middle) < 1 - 1e-7)
    inside |= torch.tensor(isinstance(scale, CosineScale))
    assert bool((scale.edges().diff() > 0)[inside].all())
    assert torch.equal(scale.bin(scale.score(middle))[inside], torch.arange(NUM_BINS)[inside])


def calibration_of(num_experts: int) -> Calibration:
    return Calibration(num_experts, CosineScale(64))


def histogram_of(calibration: Calibration, *scores: Tensor) -> Tensor:
    return torch.stack(
        [torch.bincount(calibration.scale.bin(s), minlength=NUM_BINS) for s in scores]
    )


def test_nothing_dropped_gives_no_threshold_and_all_dropped_the_highest() -> None:
    calibration = calibration_of(3)
    scores = torch.randn(3, 1000) / 8
    histogram = histogram_of(calibration, *scores)
    calibration.update(histogram, torch.tensor([1000, 0, 999]))
    assert calibration.threshold[0] == -math.inf
    assert not (scores[1] >= calibration.threshold[1]).any()
    assert calibration.threshold[2] > -math.inf
    assert calibration.kept_share().tolist() == pytest.approx([1.0, 0.0, 0.999])


def test_repeated_dropless_steps_never_round_into_a_threshold() -> None:
    calibration = calibration_of(2)
    for step in range(300):
        scores = torch.randn(2, 100 + 13 * step % 977) / 8
        histogram = histogram_of(calibration, *scores)
        calibration.update(histogram, histogram.sum(-1))
        assert (calibration.threshold == -math.inf).all()


def test_an_expert_without_choosers_keeps_its_threshold() -> None:
    calibration = calibration_of(2)
    scores = torch.randn(2, 1000) / 8
    calibration.update(histogram_of(calibration, *scores), torch.tensor([500, 300]))
    before = {name: value.clone() for name, value in calibration.state_dict().items()}
    histogram = histogram_of(calibration, scores[0] + 0.1, scores[1][:0])
    for _ in range(50):
        calibration.update(histogram, torch.tensor([500, 0]))
    for name in ("threshold", "histogram", "chosen", "kept"):
        assert torch.equal(calibration.state_dict()[name][1], before[name][1]), name
        assert not torch.equal(calibration.state_dict()[name][0], before[name][0]), name


def test_an_expert_never_chosen_has_no_threshold() -> None:
    calibration = calibration_of(2)
    histogram = histogram_of(calibration, torch.randn(100) / 8, torch.empty(0))
    calibration.update(histogram, torch.tensor([50, 0]))
    assert calibration.threshold[1] == -math.inf
    assert calibration.kept_share()[1] == 1


def test_thresholds_follow_a_moving_share() -> None:
    calibration = calibration_of(1)
    for share in torch.linspace(1.0, 0.5, 100).tolist() + [0.5] * 30:
        scores = torch.randn(1000) / 8
        calibration.update(histogram_of(calibration, scores), torch.tensor([round(1000 * share)]))
    assert share_above(torch.randn(N) / 8, calibration) == pytest.approx(0.5, abs=0.02)


def test_thresholds_follow_moving_scores() -> None:
    calibration = calibration_of(1)
    for step in range(800):
        scores = 0.3 * min(step, 200) / 200 + torch.randn(500) / 16
        calibration.update(histogram_of(calibration, scores), torch.tensor([200]))
    assert share_above(0.3 + torch.randn(N) / 16, calibration) == pytest.approx(0.4, abs=0.02)


def test_the_histogram_counts_choosers_only_and_without_the_bonus() -> None:
    scores = torch.tensor([[0.5, 0.1], [0.2, 0.4], [-0.3, 0.6], [0.9, 0.0]])
    mask = torch.tensor([True, True, True, False])
    token, expert = token_pairs(torch.tensor([[0], [1], [1], [0]]), mask, 2)
    routing = Routing(
        token=token,
        expert=expert,
        score=torch.full((4,), 0.99),  # with a bonus
        gate=torch.ones(4),
        valid_mask=mask,
        scores=scores,
        logits=None,
        probs=None,
        num_experts=2,
        top_k=1,
    )
    scale = CosineScale(16)
    found = score_histogram(routing, scale)
    assert found.dtype == torch.int64
    want = histogram_of(Calibration(2, scale), torch.tensor([0.5]), torch.tensor([0.4, 0.6]))
    assert torch.equal(found, want)


def layer_of(**options: object) -> MoE:
    config = MoEConfig(
        hidden_size=16,
        intermediate_size=4,
        num_experts=4,
        capacity=Factor(capacity_factor=0.5),
        **options,  # type: ignore[arg-type]
    )
    return MoE(config)


def test_the_layer_learns_thresholds_that_ignore_the_local_bonus() -> None:
    layer = layer_of(local_bonus=100.0)
    placement = ExpertPlacement.contiguous(4, 2, 2)
    with Collector(layer):
        layer(torch.randn(400, 16), RoutingContext(placement=placement, rank=0))
    after_step(layer)
    seen = layer.calibration.threshold[:2]
    assert bool((seen.abs() < 1).all())


def test_micro_batches_calibrate_like_one_batch() -> None:
    x = torch.randn(600, 16)
    found = []
    for parts in (1, 3):
        layer = layer_of(router="etr_paper")  # no weights, so both layers route alike
        for chunk in x.chunk(parts):
            with Collector(layer):
                layer(chunk)
        after_step(layer)
        found.append(layer.calibration)
    assert torch.equal(found[0].histogram, found[1].histogram)
    torch.testing.assert_close(found[0].kept_share(), found[1].kept_share(), atol=0.05, rtol=0)


def test_the_99th_percentile_is_that_of_the_last_step() -> None:
    layer = layer_of()
    for factor in (1.0, 3.0):
        x = torch.randn(4000, 16)
        x[:, :4] += factor
        with Collector(layer):
            layer(x)
        after_step(layer)
        score = layer.route(x, RoutingContext())[0].score
        assert score is not None
        want = float(score.quantile(0.99))
        assert float(layer.calibration.affinity_p99) == pytest.approx(want, abs=0.01)


@pytest.mark.filterwarnings("error")
def test_an_uncalibrated_layer_warns_once_and_evaluates_dropless() -> None:
    layer = layer_of()
    with pytest.warns(UserWarning, match="not calibrated") as caught:
        layer.eval()
    assert len(caught) == 1
    assert int(layer(torch.randn(40, 16)).stats["num_tokens_per_expert"].sum()) == 40
    layer.train()
    with Collector(layer):
        layer(torch.randn(40, 16))
    after_step(layer)
    layer.eval()  # calibrated now: no warning
    assert int(layer(torch.randn(4000, 16)).stats["num_tokens_per_expert"].sum()) < 4000


def test_thresholds_stay_frozen_in_eval() -> None:
    layer = layer_of()
    with Collector(layer):
        layer(torch.randn(40, 16))
    after_step(layer)
    layer.eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with Collector(layer):
        layer(torch.randn(40, 16))
    after_step(layer)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
