"""Local routing consistency: do neighbouring tokens use the same experts? (arXiv 2505.16056)

Both measures slide a window of `segment` tokens over each sequence, one token at a time. They say
how well a model goes with expert offloading, where a few experts are in fast memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


def segment_routing_best_performance(
    experts: Ints, sequence: Ints, num_experts: int, segment: int
) -> float:
    """SRP: the best F1 with which experts switched on or off for whole windows imitate a router.

    An expert is on in a window exactly if it is chosen there at least `a` times, with the best `a`
    (arXiv 2505.16056, eq. 6). 1 if tokens of a window always share their experts.

    Args:
        experts: chosen experts of N tokens, int [N, K]; negative where a token has fewer.
        sequence: the sequence each token is of, int [N], equal ones side by side.
        num_experts: E.
        segment: tokens of a window.
    Returns:
        In [0, 1]; NaN where no sequence has `segment` tokens.
    """
    histogram = np.zeros(segment + 1, dtype=np.int64)  # (window, expert) pairs by choices in them
    for counts in _window_counts(experts, sequence, num_experts, segment):
        histogram += np.bincount(counts.ravel(), minlength=segment + 1)
    if not histogram.any():
        return float("nan")
    chosen = histogram * np.arange(segment + 1)
    if not chosen.any():
        return 0.0
    # From the highest threshold down: what is on, and how many of its tokens were really chosen.
    hits = np.cumsum(chosen[::-1])
    on = segment * np.cumsum(histogram[::-1])
    return float(np.max(2 * hits / (on + chosen.sum())))


def segment_cache_best_hit_rate(
    experts: Ints, sequence: Ints, num_experts: int, segment: int, cache_size: int
) -> float:
    """SCH: share of choices found in a cache that holds each window's most chosen experts.

    The cache knows the window and stands still within it: no other set of `cache_size` experts
    has more hits there.

    Args:
        experts, sequence, num_experts, segment: as in `segment_routing_best_performance`.
        cache_size: experts that the cache holds.
    Returns:
        In [0, 1]; NaN where no sequence has `segment` tokens, or none of them has an expert.
    Raises:
        ValueError: cache_size is under 1.
    """
    if cache_size < 1:
        raise ValueError(f"cache_size={cache_size} must be at least 1, experts")
    hits = total = 0
    first = max(num_experts - cache_size, 0)
    for counts in _window_counts(experts, sequence, num_experts, segment):
        hits += int(np.partition(counts, first, axis=1)[:, first:].sum())
        total += int(counts.sum())
    return hits / total if total else float("nan")


def _window_counts(
    experts: Ints, sequence: Ints, num_experts: int, segment: int
) -> Iterator[NDArray[np.int64]]:
    """How often each expert is chosen in each window, int64 [windows, E], a sequence at a time."""
    if segment < 1:
        raise ValueError(f"segment={segment} must be at least 1, tokens")
    if experts.ndim != 2 or sequence.shape != experts.shape[:1]:
        raise ValueError(
            f"experts has shape {experts.shape} and sequence {sequence.shape}; they must be [N, K] "
            "and [N]"
        )
    if experts.size and experts.max() >= num_experts:
        raise ValueError(f"experts holds {experts.max()}; num_experts={num_experts}")
    starts = np.flatnonzero(np.diff(sequence, prepend=sequence[:1] - 1))
    for part in np.split(experts, starts[1:]):
        if len(part) < segment:
            continue
        token, place = np.nonzero(part >= 0)
        running = np.zeros((len(part) + 1, num_experts), dtype=np.int64)
        np.add.at(running, (token + 1, part[token, place]), 1)
        running = running.cumsum(axis=0)
        yield running[segment:] - running[:-segment]
