"""How well experts' tokens form clusters, and how much of that is mere trimming."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 4
"""Random subsets of tokens over which each ratio is averaged, and random partitions over which the
trimming control is."""


@torch.no_grad()
def calinski_harabasz(x: Tensor, label: Tensor, num_clusters: int) -> float:
    """Spread between clusters over spread within: ``sum n_i |c_i - c|^2 / sum |x - c_i|^2``.

    The textbook index (Calinski and Harabasz, 1974) is this times ``(N - k) / (k - 1)`` with k
    clusters that hold tokens. Without that factor the value is about ``(k - 1) / (N - k)`` where
    labels mean nothing: compare values at the same N alone.

    Args:
        x: tokens, float [N, H].
        label: cluster of each token, int64 [N]; clusters without tokens count for nothing.
        num_clusters: labels lie in [0, num_clusters).
    Returns:
        The ratio; 0 for one cluster, inf where clusters differ and each is a point, nan without
        tokens or where all tokens are equal.
    Raises:
        ValueError: shapes do not match, or a label is out of range.
    """
    _check(x, label, num_clusters)
    if not len(x):
        return math.nan
    x = x.double()
    x = x - x.mean(0)  # the overall centre c becomes 0
    size = torch.zeros(num_clusters, dtype=x.dtype, device=x.device)
    size.index_add_(0, label, torch.ones(len(x), dtype=x.dtype, device=x.device))
    centre = torch.zeros(num_clusters, x.shape[1], dtype=x.dtype, device=x.device)
    centre.index_add_(0, label, x)
    centre = centre / size.clamp_min(1)[:, None]
    between = float((size * centre.square().sum(-1)).sum())
    within = float((x - centre[label]).square().sum())
    noise = 1e-12 * (between + within)  # rounding of sums, relative to the whole spread
    if between + within == 0:
        return math.nan
    return 0.0 if between <= noise else math.inf if within <= noise else between / within


@dataclass(frozen=True, kw_only=True)
class ClusterRatios:
    """Calinski-Harabasz ratios of one layer's tokens by expert, all at one number of tokens."""

    all: float
    """Ratio of all tokens."""
    kept: float
    """Ratio of the tokens that their expert keeps."""
    trimmed: float
    """What `kept` would be if trimming had raised it as it does where experts mean nothing;
    only what `kept` has above it speaks for the router."""
    num_tokens: int
    """Tokens behind each of them."""


@torch.no_grad()
def kept_calinski_harabasz(
    x: Tensor,
    label: Tensor,
    kept: Tensor,
    num_clusters: int,
    *,
    num_tokens: int,
    by_score: bool = True,
    generator: torch.Generator | None = None,
) -> ClusterRatios:
    """Ratio of all tokens and of kept ones at a fixed number of tokens, and a trimming control.

    Who keeps the tokens that lie furthest along a direction raises the ratio, whatever the
    direction. The control measures that rise on the same tokens, centred, in a partition without
    meaning: random orthonormal directions, one per expert in use, each token in the cluster of its
    largest projection, each cluster trimmed to its largest projections. Clusters are matched with
    experts by size and keep their expert's share. The control's rise is added to the ratio of all
    tokens, since trimming along a random direction adds to the spread between clusters and leaves
    what separates them as it was. Every ratio is a mean over `DRAWS` random subsets.

    Args:
        x: tokens, float [N, H] with H >= num_clusters.
        label: the expert each token wants most, int64 [N].
        kept: True where that expert keeps it, bool [N].
        num_clusters: E.
        num_tokens: tokens in each random subset; fewer where fewer are kept.
        by_score: experts keep their best-scoring tokens; False where what they keep does not
            depend on a score, for then trimming raises nothing and `trimmed` is `all`.
        generator: of the subsets and directions, on the CPU.
    Returns:
        ClusterRatios; nan where there are no tokens to compare.
    Raises:
        ValueError: shapes do not match, H < num_clusters, or num_tokens < 1.
    """
    _check_trimming(x, label, kept, num_clusters, num_tokens)
    every = torch.arange(len(x), device=x.device)
    count = min(num_tokens, int(kept.sum()))
    rest = every[kept]

    def ratio(among: Tensor, labels: Tensor, size: int) -> float:
        chosen = among[torch.randperm(len(among), generator=generator)[:size].to(among.device)]
        return calinski_harabasz(x[chosen], labels[chosen], num_clusters)

    whole, best, rise = 0.0, 0.0, 0.0
    for _ in range(DRAWS):
        whole += ratio(every, label, count) / DRAWS
        best += ratio(rest, label, count) / DRAWS
        if by_score and 0 < len(rest) < len(x):
            null, survives = _null_partition(x, label, kept, num_clusters, generator)
            size = min(count, int(survives.sum()))
            rise += (ratio(every[survives], null, size) - ratio(every, null, size)) / DRAWS
    return ClusterRatios(all=whole, kept=best, trimmed=whole + rise, num_tokens=count)


def _check_trimming(
    x: Tensor, label: Tensor, kept: Tensor, num_clusters: int, num_tokens: int
) -> None:
    _check(x, label, num_clusters)
    if kept.shape != label.shape or kept.dtype != torch.bool:
        raise ValueError(
            f"kept is {kept.dtype} {tuple(kept.shape)}; it must be bool {tuple(label.shape)}"
        )
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1")
    if x.shape[1] < num_clusters:
        raise ValueError(
            f"x has {x.shape[1]} dimensions; the trimming control needs as many as there are "
            f"clusters, {num_clusters}"
        )


def _null_partition(
    x: Tensor, label: Tensor, kept: Tensor, num_clusters: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Clusters along random directions, and who survives a trim like the experts', each [N]."""
    asked = torch.bincount(label, minlength=num_clusters)
    share = torch.bincount(label[kept], minlength=num_clusters) / asked.clamp_min(1)
    used = int((asked > 0).sum())
    directions, _ = torch.linalg.qr(
        torch.randn(x.shape[1], used, generator=generator, dtype=torch.float64)
    )
    x = x.double()
    score, null = ((x - x.mean(0)) @ directions.to(x.device)).max(-1)
    size = torch.bincount(null, minlength=used)
    target = torch.zeros_like(
        share[:used]
    )  # the n-th largest cluster keeps the n-th expert's share
    target[size.argsort(descending=True)] = share[asked.argsort(descending=True)[:used]]
    survives = torch.zeros_like(kept)
    for cluster in range(used):
        members = (null == cluster).nonzero().squeeze(-1)
        keep = int((target[cluster] * len(members)).round())
        survives[members[score[members].argsort(descending=True)[:keep]]] = True
    return null, survives


def _check(x: Tensor, label: Tensor, num_clusters: int) -> None:
    if x.dim() != 2 or label.shape != x.shape[:1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and label {tuple(label.shape)}; they must be [N, H] "
            "and [N]"
        )
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_clusters:
        raise ValueError(
            f"label lies in [{int(label.min())}, {int(label.max())}]; it must lie in "
            f"[0, num_clusters={num_clusters})"
        )
