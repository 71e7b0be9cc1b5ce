"""Cluster ratios against plain loops, and the trimming control where the answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from etr.diagnostics import calinski_harabasz, kept_calinski_harabasz


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def in_loops(x: list[list[float]], label: list[int]) -> float:
    def mean(rows: list[list[float]]) -> list[float]:
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def square(a: list[float], b: list[float]) -> float:
        return sum((i - j) ** 2 for i, j in zip(a, b, strict=True))

    centre, between, within = mean(x), 0.0, 0.0
    for cluster in set(label):
        rows = [row for row, own in zip(x, label, strict=True) if own == cluster]
        between += len(rows) * square(mean(rows), centre)
        within += sum(square(row, mean(rows)) for row in rows)
    return between / within


@pytest.mark.parametrize("num_clusters", [2, 3, 7])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_ratio_equals_plain_loops(num_clusters, offset):
    x = torch.randn(40, 5, generator=seeded()).double() + offset
    label = torch.randint(num_clusters - 1, (40,), generator=seeded(1))  # the last one is empty
    expected = in_loops(x.tolist(), label.tolist())
    assert calinski_harabasz(x, label, num_clusters) == pytest.approx(expected, rel=1e-9)
    moved = calinski_harabasz(x * -3 + 2, label, num_clusters)
    assert moved == pytest.approx(expected, rel=1e-9)


def test_edge_cases():
    x = torch.randn(6, 3, generator=seeded())
    one = torch.zeros(6, dtype=torch.int64)
    assert calinski_harabasz(x, one, 4) == 0.0
    assert calinski_harabasz(x, torch.arange(6), 6) == math.inf
    assert math.isnan(calinski_harabasz(torch.ones(6, 3), torch.arange(6), 6))
    assert math.isnan(calinski_harabasz(torch.zeros(6, 3), one, 2))
    assert math.isnan(calinski_harabasz(x[:1], one[:1], 2))
    assert math.isnan(calinski_harabasz(x[:0], one[:0], 2))


@pytest.mark.parametrize(
    ("label", "message"),
    [(torch.tensor([0, 1]), "must be"), (torch.tensor([0, 1, 5]), r"label lies in \[0, 5\]")],
)
def test_wrong_labels_are_refused(label, message):
    with pytest.raises(ValueError, match=message):
        calinski_harabasz(torch.ones(3, 2), label, 2)


def keep_best(score: Tensor, label: Tensor, num_experts: int, share: float) -> Tensor:
    kept = torch.zeros(len(score), dtype=torch.bool)
    for expert in range(num_experts):
        own = (label == expert).nonzero().squeeze(-1)
        order = score[own].argsort(descending=True)
        kept[own[order[: int(share * len(own))]]] = True
    return kept


def routed(x: Tensor, num_experts: int, share: float) -> tuple[Tensor, Tensor]:
    """Choice by block sums, and the best `share` of each expert."""
    width = x.shape[1] // num_experts
    score, label = x.unflatten(-1, (num_experts, width)).sum(-1).max(-1)
    return label, keep_best(score, label, num_experts, share)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_on_noise_the_control_explains_the_rise(share):
    x = torch.randn(4096, 64, generator=seeded())
    label, kept = routed(x, 8, share)
    found = kept_calinski_harabasz(x, label, kept, 8, num_tokens=1200, generator=seeded(1))
    assert found.num_tokens == 1200
    rise = found.kept - found.all
    assert rise > 0.2 * found.all  # trimming alone, and nothing else, did this
    assert found.trimmed - found.all == pytest.approx(rise, rel=0.35)


def test_clusters_rise_above_the_control():
    """Half of the tokens belong to an expert, and experts keep those."""
    noise = torch.randn(4096, 64, generator=seeded())
    own = torch.randint(8, (4096,), generator=seeded(1))
    signal = torch.eye(8).repeat_interleave(8, dim=1)[own] * (torch.arange(4096) % 2)[:, None]
    x = noise + 2 * signal
    label, kept = routed(x, 8, 0.5)
    found = kept_calinski_harabasz(x, label, kept, 8, num_tokens=1200, generator=seeded(2))
    assert found.kept > 1.5 * found.trimmed
    assert found.trimmed > found.all


def test_trimming_without_a_score_raises_nothing():
    x = torch.randn(2000, 32, generator=seeded())
    label, _ = routed(x, 4, 1.0)
    kept = torch.rand(2000, generator=seeded(1)) < 0.5
    found = kept_calinski_harabasz(
        x, label, kept, 4, num_tokens=900, by_score=False, generator=seeded(2)
    )
    assert found.trimmed == found.all
    assert found.kept == pytest.approx(found.all, rel=0.15)


def test_number_of_tokens_is_the_same_for_all():
    x = torch.randn(100, 8, generator=seeded())
    label, kept = routed(x, 4, 0.5)
    few = kept_calinski_harabasz(x, label, kept, 4, num_tokens=10_000, generator=seeded(1))
    assert few.num_tokens == int(kept.sum())
    again = kept_calinski_harabasz(x, label, kept, 4, num_tokens=10_000, generator=seeded(1))
    assert few == again


def test_nothing_kept_everything_kept_and_unused_experts():
    x = torch.randn(60, 8, generator=seeded())
    label = torch.zeros(60, dtype=torch.int64)
    none, every = torch.zeros(60, dtype=torch.bool), torch.ones(60, dtype=torch.bool)
    nothing = kept_calinski_harabasz(x, label, none, 4, num_tokens=32, generator=seeded())
    assert nothing.num_tokens == 0
    assert math.isnan(nothing.kept)
    collapsed = kept_calinski_harabasz(x, label, every, 4, num_tokens=32, generator=seeded())
    assert collapsed.all == collapsed.kept == collapsed.trimmed == 0.0
    half = kept_calinski_harabasz(
        x, label, every & (torch.arange(60) < 30), 4, num_tokens=32, generator=seeded()
    )
    assert half.all == half.kept == half.trimmed == 0.0  # one expert in use: nothing to tell apart


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"kept": torch.ones(5)}, "it must be bool"),
        ({"num_clusters": 9}, "needs as many"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    values = {
        "x": torch.ones(5, 8),
        "label": torch.zeros(5, dtype=torch.int64),
        "kept": torch.ones(5, dtype=torch.bool),
        "num_clusters": 2,
        "num_tokens": 3,
    }
    with pytest.raises(ValueError, match=message):
        kept_calinski_harabasz(**{**values, **changes})
