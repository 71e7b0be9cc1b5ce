"""Who uses which expert, how evenly, and how sure the router is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@torch.no_grad()
def mutual_information(counts: Tensor) -> float:
    """Mutual information of domain and expert, in bits: 0 where experts ignore the domain.

    The plain estimate from counts. It is too large by about ``(D - 1)(E - 1) / (2 N ln 2)`` bits
    with N counted choices (see `mutual_information_bias`): compare values at the same N.

    Args:
        counts: choices by domain and expert, [D, E], not negative.
    Returns:
        Bits, between 0 and ``log2(min(D, E))``; 0 without any choice.
    Raises:
        ValueError: counts has another number of dimensions, or a negative entry.
    """
    counts = _check_counts(counts)
    total = counts.sum()
    if total == 0:
        return 0.0
    joint = counts / total
    even = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    used = joint > 0
    return max(float((joint[used] * (joint[used] / even[used]).log2()).sum()), 0.0)


def mutual_information_bias(counts: Tensor) -> float:
    """First-order bias of `mutual_information` in bits (Miller and Madow), from 0 upwards.

    Args:
        counts: choices by domain and expert, [D, E]; domains and experts without any are left out.
    """
    counts = _check_counts(counts)
    total = float(counts.sum())
    if total == 0:
        return 0.0
    domains, experts = int((counts.sum(1) > 0).sum()), int((counts.sum(0) > 0).sum())
    return (domains - 1) * (experts - 1) / (2 * total * math.log(2))


@torch.no_grad()
def load_ecdf(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Empirical distribution of experts' load.

    Args:
        counts: tokens or choices of each expert, any shape.
    Returns:
        load: over the mean load, ascending, float64 [n]; 1 everywhere is perfect balance.
        share: experts with at most that load, in (0, 1], float64 [n].
        Both without entries where there is no load.
    """
    load = counts.double().flatten()
    if not len(load) or load.sum() == 0:
        return load[:0], load[:0]
    load = (load / load.mean()).sort().values
    place = torch.searchsorted(load, load, right=True)
    return load, place.double() / len(load)


@dataclass(frozen=True, kw_only=True)
class AffinityHistogram:
    """Densities of selection scores."""

    edges: Tensor
    """Edges of equal bins, ascending, float64 [n + 1]."""
    own: Tensor
    """Density of the experts that a token chose, per unit of score, float64 [n]."""
    others: Tensor
    """Density of all others, float64 [n]; zeros where every expert is chosen."""


@torch.no_grad()
def affinity_histogram(scores: Tensor, chosen: Tensor, num_bins: int = 40) -> AffinityHistogram:
    """Selection scores of chosen experts against those of all others.

    Args:
        scores: float [N, E].
        chosen: True where the token chose the expert, bool [N, E].
        num_bins: equal bins between the smallest and the largest score.
    Raises:
        ValueError: shapes differ, there is no score, or num_bins < 1.
    """
    if scores.shape != chosen.shape or not scores.numel() or num_bins < 1:
        raise ValueError(
            f"scores {tuple(scores.shape)} and chosen {tuple(chosen.shape)} must have one shape "
            f"and an entry, and num_bins={num_bins} must be at least 1"
        )
    scores = scores.double().cpu()
    chosen = chosen.cpu()
    low, high = float(scores.min()), float(scores.max())
    edges = torch.linspace(low, max(high, low + 1e-6), num_bins + 1, dtype=scores.dtype)
    return AffinityHistogram(
        edges=edges,
        own=_density(scores[chosen], edges),
        others=_density(scores[~chosen], edges),
    )


def _density(values: Tensor, edges: Tensor) -> Tensor:
    if not len(values):
        return torch.zeros(len(edges) - 1, dtype=edges.dtype)
    return torch.histogram(values, edges, density=True).hist


def _check_counts(counts: Tensor) -> Tensor:
    if counts.dim() != 2 or bool((counts < 0).any()):
        raise ValueError(
            f"counts has shape {tuple(counts.shape)}; it must be [D, E] without negative entries"
        )
    return counts.double()
