"""Balance and locality losses: pure functions of a Routing.

Every mean is a sum over valid tokens divided by their global number. Where ranks share a group,
each rank's loss is scaled so that the *average* over the group's ranks (what DDP and FSDP compute
from gradients) equals the loss of one rank that holds all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from etr.moe.checked import check_types
from etr.moe.context import RoutingContext
from etr.moe.routing import Routing
from etr.moe.topology import ExpertPlacement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AuxMode = Literal["micro", "ranks", "running", "previous"]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the router's losses."""

    aux_alpha: float | None = None
    """Weight of the balance loss, no unit. None: the router's own (0.01, or 0 where experts choose
    or the router has no probabilities)."""
    aux_mode: AuxMode = "ranks"
    """Whose choices count as load. micro: this rank's micro-batch. ranks: summed over data ranks.
    running: plus the step's earlier micro-batches. previous: the last optimizer step's."""
    z_beta: float = 0.0
    """Weight of the mean squared log-sum-exp of the logits, no unit."""
    locality_mu: float | None = None
    """Weight of the locality loss, no unit. None: 0.01 with more than one node, else 0."""
    locality_epsilon: float = 0.1
    """Share of the target that is spread over all experts; 0 would make the divergence infinite."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("aux_alpha", "z_beta", "locality_mu"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must be >= 0")
        if not 0 < self.locality_epsilon <= 1:
            raise ValueError(f"locality_epsilon={self.locality_epsilon} must lie in (0, 1]")


def scaled_losses(
    config: LossConfig,
    alpha: float,
    routing: Routing,
    context: RoutingContext,
    *,
    choices: Tensor,
    past: Tensor,
    earlier: Tensor | None,
) -> dict[str, Tensor]:
    """Scaled losses of one forward; those with weight 0 are left out.

    Args:
        config: the weights.
        alpha: weight of the balance loss.
        routing: choices of this rank's tokens.
        context: placement and groups.
        choices: choices per expert of this rank's tokens, int64 [E].
        past: choices per expert in the last optimizer step, [E].
        earlier: in the step's earlier micro-batches, int64 [E], or None.
    Raises:
        ValueError: a locality loss without a placement.
    """
    found = {}
    if alpha:
        load = _load(config.aux_mode, choices, context.data_group, past, earlier)
        found["aux"] = alpha * balance_loss(routing, load, context.data_group)
    if config.z_beta:
        found["z"] = config.z_beta * z_loss(routing, context.data_group)
    mu, placement = config.locality_mu, context.placement
    if mu is None:
        many = placement is not None and placement.num_nodes > 1
        mu = 0.01 if many and routing.probs is not None else 0.0
    if mu:
        if placement is None:
            raise ValueError(
                f"losses.locality_mu={mu} needs RoutingContext(placement=ExpertPlacement(...))"
            )
        found["locality"] = mu * locality_loss(
            routing, placement, context.rank, config.locality_epsilon, context.node_group
        )
    return found


def _load(
    mode: AuxMode,
    load: Tensor,
    group: ProcessGroup | None,
    past: Tensor,
    earlier: Tensor | None,
) -> Tensor:
    """Choices that the balance loss counts as load, [E]."""
    if mode == "previous":
        # Even before the first step: no gradient, whatever the ranks and micro-batches.
        return torch.where(past.sum() > 0, past, 1.0)
    if mode == "micro":
        return load
    if mode == "running" and earlier is not None:
        load = load + earlier
    return sum_over_group(load, group)


def balance_loss(routing: Routing, load: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """``E * sum_e f_e P_e``: 1 when load or probabilities are even, E when all go to one expert.

    arXiv 2101.03961, eq. 4; f may come from more tokens than P (arXiv 2501.11873).

    Args:
        routing: gives P, the mean probability of each expert over valid tokens.
        load: choices per expert that f is the share of, [E]; no gradient.
        group: ranks over whose tokens P's mean is taken; `load` must be global already.
    Returns:
        scalar, not yet scaled by alpha.
    Raises:
        ValueError: the router has no probabilities.
    """
    if routing.probs is None:
        raise ValueError("the balance loss needs probabilities, and this router has none")
    share = load.detach().to(routing.probs.dtype)
    share = share / share.sum().clamp_min(1.0)
    return routing.num_experts * (share * _mean_over_valid(routing.probs, routing, group)).sum()


def z_loss(routing: Routing, group: ProcessGroup | None = None) -> Tensor:
    """Mean over valid tokens of ``logsumexp(logits)^2`` (arXiv 2202.08906, eq. 5), unscaled."""
    if routing.logits is None:
        raise ValueError("the z loss needs logits, and this router has none")
    return _mean_over_valid(routing.logits.logsumexp(-1).square(), routing, group)


def locality_loss(
    routing: Routing,
    placement: ExpertPlacement,
    rank: int,
    epsilon: float = 0.1,
    node_group: ProcessGroup | None = None,
) -> Tensor:
    """``KL(D_c || D_l)``: how far a node's tokens are from using the node's own experts.

    arXiv 2406.00023, section 3.4. D_c is the mean probability over the valid tokens of one node in
    one micro-batch; ``D_l = (1 - epsilon) uniform(experts on the node) + epsilon uniform(all)``,
    since a target with zeros makes the divergence infinite.

    Args:
        routing: choices of this rank's tokens.
        placement: where experts live.
        rank: this rank.
        epsilon: share of the target spread over all experts.
        node_group: ranks of this node; None when the node has one rank.
    Returns:
        scalar, not yet scaled by mu; 0 where no token is valid.
    """
    if routing.probs is None:
        raise ValueError("the locality loss needs probabilities, and this router has none")
    mean = _mean_over_valid(routing.probs, routing, node_group, average_ranks=False)
    target = locality_target(placement, placement.node_of_rank[rank], epsilon).to(mean)
    total = mean.sum()
    mean = mean / torch.where(total > 0, total, 1.0)
    return torch.where(mean > 0, mean * (mean.clamp_min(1e-30).log() - target.log()), 0.0).sum()


def locality_target(placement: ExpertPlacement, node: int, epsilon: float) -> Tensor:
    """The distribution over experts that tokens of `node` should have, float64 [E]."""
    local = torch.zeros(placement.num_experts, dtype=torch.float64)
    experts = placement.experts_on_node(node)
    if not experts:
        return torch.full_like(local, 1 / placement.num_experts)
    local[list(experts)] = 1 / len(experts)
    return (1 - epsilon) * local + epsilon / placement.num_experts


def sum_over_group(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """All-reduced copy of `value` without gradient; `value` itself without a group."""
    value = value.detach()
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def _mean_over_valid(
    values: Tensor, routing: Routing, group: ProcessGroup | None, average_ranks: bool = True
) -> Tensor:
    """Mean of per-token values over the group's valid tokens.

    With `average_ranks` only this rank's part is returned, times the number of ranks, so that the
    average over ranks is the mean. Without, every rank gets the whole value, and a gradient that
    is whole after averaging over all ranks.
    """
    mask = routing.valid_mask if values.dim() == 1 else routing.valid_mask[:, None]
    local = torch.where(mask, values, 0.0).sum(0)
    count = sum_over_group(routing.num_valid_tokens(), group).clamp_min(1)
    ranks = 1 if group is None else dist.get_world_size(group)
    if average_ranks or group is None:
        return ranks * local / count
    # Each of the group's ranks returns the same value, and each depends on this rank's tokens:
    # `ranks * local` carries all those gradients without a collective in the backward pass.
    whole = sum_over_group(local, group)
    return (ranks * local + (whole - ranks * local).detach()) / count
