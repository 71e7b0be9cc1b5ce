"""Local routing consistency: do neighbouring tokens use the same experts? (arXiv 2505.16056)

Both measures slide a window of `segment` tokens over each sequence, one token at a time. They say
how well a model goes with expert offloading, where a few experts are in fast memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from etr.table import Table


def segment_routing_best_performance(
    experts: Any, sequence: Any, num_experts: int, segment: int
) -> float:
    """SRP: the best F1 with which experts switched on or off for whole windows imitate a router.

    An expert is on in a window exactly if it is chosen there at least `a` times, with the best `a`
    (arXiv 2505.16056, eq. 6). 1 if tokens of a window always share their experts.

    Args:
        experts: chosen experts of N tokens, int [N, K]; negative where a token has fewer. A tensor
            or an array.
        sequence: the sequence each token is of, [N], equal ones side by side.
        num_experts: E.
        segment: tokens of a window.
    Returns:
        In [0, 1]; NaN where no sequence has `segment` tokens.
    """
    # (window, expert) pairs by choices in them
    histogram = torch.zeros(max(segment, 0) + 1, dtype=torch.int64)
    for counts in _window_counts(experts, sequence, num_experts, segment):
        histogram += torch.bincount(counts.flatten(), minlength=segment + 1)
    if not histogram.any():
        return float("nan")
    chosen = histogram * torch.arange(segment + 1)
    if not chosen.any():
        return 0.0
    # From the highest threshold down: what is on, and how many of its tokens were really chosen.
    hits = chosen.flip(0).cumsum(0)
    on = segment * histogram.flip(0).cumsum(0)
    return float((2 * hits.double() / (on + chosen.sum())).max())


def segment_cache_best_hit_rate(
    experts: Any, sequence: Any, num_experts: int, segment: int, cache_size: int
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
    held = min(cache_size, num_experts)
    for counts in _window_counts(experts, sequence, num_experts, segment):
        hits += int(counts.topk(held, dim=1).values.sum())
        total += int(counts.sum())
    return hits / total if total else float("nan")


def _window_counts(experts: Any, sequence: Any, num_experts: int, segment: int) -> Iterator[Tensor]:
    """How often each expert is chosen in each window, int64 [windows, E], a sequence at a time."""
    # Copied: arrays that were read from a file cannot be written to, of which torch would warn.
    experts, sequence = (
        x if isinstance(x, Tensor) else torch.tensor(x) for x in (experts, sequence)
    )
    if segment < 1:
        raise ValueError(f"segment={segment} must be at least 1, tokens")
    if experts.ndim != 2 or sequence.shape != experts.shape[:1]:
        raise ValueError(
            f"experts has shape {tuple(experts.shape)} and sequence {tuple(sequence.shape)}; they "
            "must be [N, K] and [N]"
        )
    if experts.numel() and experts.max() >= num_experts:
        raise ValueError(f"experts holds {int(experts.max())}; num_experts={num_experts}")
    lengths = torch.unique_consecutive(sequence, return_counts=True)[1]
    for part in experts.long().split(lengths.tolist()):
        if len(part) < segment:
            continue
        # Negative ones count in a column of their own, which is cut off.
        chosen = part.masked_fill(part < 0, num_experts)
        running = torch.zeros(len(part) + 1, num_experts + 1, dtype=torch.int64)
        running[1:].scatter_add_(1, chosen, torch.ones_like(chosen))
        running = running[:, :num_experts].cumsum(0)
        yield running[segment:] - running[:-segment]


class Measure:
    """A frozen config of one number that says how a layer routes; one row of `MEASURES`."""

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for pages."""

    @property
    def title(self) -> str:
        """Head of a column."""
        return self.name

    def of(self, experts: Any, sequence: Any, num_experts: int) -> float:
        """Measure one layer.

        Args:
            experts, sequence, num_experts: as in `segment_routing_best_performance`.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SegmentRouting(Measure):
    """SRP, see `segment_routing_best_performance`."""

    name = "srp"
    summary = "best F1 with which experts on or off for whole windows imitate the router"

    segment: int = 16
    """Tokens of a window."""

    @property
    def title(self) -> str:
        return f"SRP({self.segment})"

    def of(self, experts: Any, sequence: Any, num_experts: int) -> float:
        return segment_routing_best_performance(experts, sequence, num_experts, self.segment)


@dataclass(frozen=True, kw_only=True)
class SegmentCache(Measure):
    """SCH, see `segment_cache_best_hit_rate`."""

    name = "sch"
    summary = "choices found in a cache of each window's most chosen experts"

    segment: int = 16
    """Tokens of a window."""
    size: int = 4
    """Experts that the cache holds."""

    @property
    def title(self) -> str:
        return f"SCH({self.segment}, {self.size})"

    def of(self, experts: Any, sequence: Any, num_experts: int) -> float:
        window = (experts, sequence, num_experts, self.segment)
        return segment_cache_best_hit_rate(*window, self.size)


MEASURES: Table[Measure] = Table("measure", (SegmentRouting, SegmentCache))
"""Measures of a trace by name."""
