"""Information, load and affinity distributions against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from etr.diagnostics import (
    affinity_histogram,
    load_ecdf,
    mutual_information,
    mutual_information_bias,
)


def in_loops(counts: list[list[float]]) -> float:
    """H(domain) + H(expert) - H(both), bits: another formula for the same."""

    def entropy(values: list[float]) -> float:
        total = sum(values)
        return -sum(v / total * math.log2(v / total) for v in values if v)

    rows, columns = [sum(r) for r in counts], [sum(c) for c in zip(*counts, strict=True)]
    return entropy(rows) + entropy(columns) - entropy([v for row in counts for v in row])


@pytest.mark.parametrize("shape", [(2, 3), (6, 8), (1, 5), (4, 1)])
def test_information_equals_entropies(shape):
    counts = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    assert mutual_information(counts) == pytest.approx(in_loops(counts.tolist()), abs=1e-9)


def test_information_between_none_and_all():
    assert mutual_information(10 * torch.eye(4)) == pytest.approx(2.0)
    assert mutual_information(torch.ones(3, 4)) == pytest.approx(0.0, abs=1e-12)
    assert mutual_information(torch.zeros(3, 4)) == 0.0
    assert mutual_information(torch.tensor([[5, 0, 0], [0, 0, 0], [0, 5, 0]])) == pytest.approx(1.0)
    for bad in (torch.ones(3), torch.tensor([[1, -1]])):
        with pytest.raises(ValueError, match="counts has shape"):
            mutual_information(bad)


def test_bias_is_what_independent_counts_show():
    generator = torch.Generator().manual_seed(0)
    domains, experts, tokens, found = 4, 6, 400, []
    for _ in range(200):
        pairs = torch.randint(domains * experts, (tokens,), generator=generator)
        counts = torch.bincount(pairs, minlength=domains * experts).view(domains, experts)
        found.append(mutual_information(counts))
    bias = mutual_information_bias(torch.ones(domains, experts) * tokens / (domains * experts))
    assert sum(found) / len(found) == pytest.approx(bias, rel=0.1)
    assert mutual_information_bias(torch.zeros(2, 2)) == 0.0


def test_load_ecdf_counts_experts():
    counts = torch.tensor([[4, 0, 2], [2, 2, 2]])
    load, share = load_ecdf(counts)
    values = sorted(c / 2 for c in counts.flatten().tolist())
    assert load.tolist() == pytest.approx(values)
    assert share.tolist() == pytest.approx([sum(v <= x for v in values) / 6 for x in values])
    assert [len(part) for part in load_ecdf(torch.zeros(4))] == [0, 0]
    assert [part.tolist() for part in load_ecdf(torch.tensor([7]))] == [[1.0], [1.0]]


def test_affinity_densities_integrate_to_one():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 5, generator=generator)
    chosen = torch.zeros(300, 5, dtype=torch.bool).scatter(1, scores.argmax(-1, True), True)
    found = affinity_histogram(scores, chosen, num_bins=16)
    width = found.edges.diff()
    assert len(found.edges) == 17
    for density, values in ((found.own, scores[chosen]), (found.others, scores[~chosen])):
        assert float((density * width).sum()) == pytest.approx(1.0)
        inside = (values >= found.edges[4]) & (values < found.edges[8])
        assert float((density * width)[4:8].sum()) == pytest.approx(inside.double().mean().item())
    mean = (found.edges[:-1] + found.edges[1:]) / 2
    assert (found.own * width * mean).sum() > (found.others * width * mean).sum()


def test_affinity_edge_cases():
    one = affinity_histogram(torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool), num_bins=4)
    assert not one.others.any()
    assert float((one.own * one.edges.diff()).sum()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="must have one shape"):
        affinity_histogram(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_bins=0"):
        affinity_histogram(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool), num_bins=0)
