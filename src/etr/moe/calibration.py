"""Thresholds: what score must a token reach to be kept, as training kept it.

Expert choice over a batch lets later tokens push out earlier ones, and a single decoded token has
no rivals at all. A threshold per expert, calibrated to the share of choosers that training keeps,
is causal, needs no communication and gives the same selection in prefill, decode and any batch
split.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from etr.moe.learner import Learner, Seen, Step
from etr.moe.routing import Routing
from etr.moe.score_scale import NUM_BINS, ScoreScale
from etr.moe.select import pair_scores
from etr.moe.stats import target_kept

HISTOGRAM_DECAY = 0.95
"""Part of the running histogram that survives one optimizer step (for experts with choosers).
Slower, and scores of weights long gone shift the thresholds; faster, and few tokens are left."""
SHARE_DECAY = 0.9
"""The same for the share to keep: a count is less noisy than a quantile, and a moving capacity
schedule must be followed at once."""


@torch.no_grad()
def score_histogram(routing: Routing, scale: ScoreScale) -> Tensor:
    """Scores of each expert's choosers, counted by bin, int64 [E, NUM_BINS]. No synchronisation."""
    key = routing.expert * NUM_BINS + scale.bin(pair_scores(routing))
    counts = torch.zeros((routing.num_experts + 1) * NUM_BINS, dtype=torch.int64, device=key.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    return counts.view(-1, NUM_BINS)[: routing.num_experts]


class Calibration(Learner):
    """Running score histograms and the thresholds read off them.

    Args:
        num_experts: E.
        scale: bins of the router's scores.
    """

    threshold: Tensor
    histogram: Tensor
    chosen: Tensor
    kept: Tensor
    affinity_p99: Tensor
    num_updates: Tensor

    def __init__(self, num_experts: int, scale: ScoreScale) -> None:
        super().__init__()
        self.scale = scale
        self.register_state("threshold", (num_experts,), -math.inf)
        self.register_state("histogram", (num_experts, NUM_BINS), 0.0)
        self.register_state("chosen", (num_experts,), 0.0)
        self.register_state("kept", (num_experts,), 0.0)
        self.register_state("affinity_p99", (), 0.0)
        self.register_state("num_updates", (), 0, torch.int64)

    @property
    def is_calibrated(self) -> bool:
        """Whether the thresholds have learned anything. Waits for the device."""
        return not self.num_updates.is_meta and bool(self.num_updates > 0)

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        if seen.routing.scores is None:
            return {}
        return {"score_histogram": score_histogram(seen.routing, self.scale)}

    def after_step(self, step: Step) -> None:
        if "score_histogram" in step.counters:
            self.update(step.counters["score_histogram"], target_kept(step.counters))

    @torch.no_grad()
    def update(self, histogram: Tensor, kept: Tensor, decay: float | None = None) -> None:
        """Take in one step and set the thresholds.

        An expert without choosers keeps what it had. Where nothing was dropped the threshold is
        -inf.

        Args:
            histogram: `score_histogram` of the step, summed over micro-batches and ranks.
            kept: choosers that the policy kept, [E].
            decay: weight of all earlier steps; 1 sums evenly. None: `HISTOGRAM_DECAY` for the
                scores and `SHARE_DECAY` for the share to keep.
        """
        chosen = histogram.sum(-1)
        seen = chosen > 0
        slow = HISTOGRAM_DECAY if decay is None else decay
        fast = SHARE_DECAY if decay is None else decay
        self.histogram.copy_(
            torch.where(seen[:, None], slow * self.histogram + histogram, self.histogram)
        )
        self.chosen.copy_(torch.where(seen, fast * self.chosen + chosen, self.chosen))
        self.kept.copy_(torch.where(seen, fast * self.kept + kept, self.kept))
        self.threshold.copy_(self._quantiles())
        p99 = self.scale.score(
            _quantile(histogram.sum(0, keepdim=True), self.threshold.new_tensor([0.01]))
        )
        self.affinity_p99.copy_(torch.where(seen.any(), p99[0], self.affinity_p99))
        self.num_updates += 1

    def kept_share(self) -> Tensor:
        """Share of choosers that training keeps, float32 [E]; 1 for an expert never chosen."""
        return torch.where(self.chosen > 0, self.kept / self.chosen.clamp_min(1e-30), 1.0)

    def _quantiles(self) -> Tensor:
        share = self.kept_share()
        found = self.scale.score(_quantile(self.histogram, share)).to(self.threshold.dtype)
        # Running means of equal counts are equal, so this comparison is exact; the slack covers
        # sums that were reduced in another order.
        found = torch.where(share >= 1 - 1e-6, -math.inf, found)
        found = torch.where(self.kept > 0, found, math.inf)
        return torch.where(self.chosen > 0, found, self.threshold)


def _quantile(counts: Tensor, upper_share: Tensor) -> Tensor:
    """Coordinate above which `upper_share` of each row's mass lies, linear within a bin.

    Args:
        counts: [N, NUM_BINS].
        upper_share: [N].
    Returns:
        float64 [N] in [0, 1].
    """
    counts = counts.double()
    above = counts.flip(-1).cumsum(-1).flip(-1)  # mass in this bin and higher
    goal = above[:, :1] * upper_share[:, None]
    # The bin in which the mass from the top first reaches the goal.
    index = ((above >= goal).sum(-1, keepdim=True) - 1).clamp(0, NUM_BINS - 1)
    inside = (above.gather(-1, index) - goal) / counts.gather(-1, index).clamp_min(1e-30)
    return ((index + inside.clamp(0, 1)) / NUM_BINS).squeeze(-1)
