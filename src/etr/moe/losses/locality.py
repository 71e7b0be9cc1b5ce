"""The locality loss: what keeps a node's tokens on the node's experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etr.moe.losses.base import Loss, LossInput
from etr.moe.losses.means import mean_over_valid
from etr.moe.routing import Routing
from etr.moe.topology import ExpertPlacement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Locality(Loss):
    """How far a node's tokens are from using the node's experts; see `locality_loss`.

    Its own weight is 0.01 with more than one node, else 0.
    """

    name = "locality"
    own = 0.01
    needs = ("has_probs",)

    epsilon: float = 0.1
    """Share of the target that is spread over all experts; 0 would make the divergence infinite."""
    nodes: int | None = None
    """Nodes among which one process shares its tokens, in equal blocks, and its experts: the loss
    of as many ranks that are not there. None: the nodes that are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.epsilon <= 1:
            raise ValueError(f"epsilon={self.epsilon} of loss 'locality' must lie in (0, 1]")
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"nodes={self.nodes} of loss 'locality' must be at least 1")

    def own_weight(self, placement: ExpertPlacement | None) -> float:
        nodes = self.nodes or (placement.num_nodes if placement is not None else 1)
        return self.own if nodes > 1 else 0.0

    def __call__(self, given: LossInput) -> Tensor:
        context = given.context
        if self.nodes is not None:
            return self._of_blocks(given, self.nodes)
        if context.placement is None:
            raise ValueError(
                f"the locality loss (weight={self.weight}; locality_mu of LossConfig) needs "
                "RoutingContext(placement=ExpertPlacement(...))"
            )
        return locality_loss(
            given.routing, context.placement, context.rank, self.epsilon, context.node_group
        )

    def _of_blocks(self, given: LossInput, nodes: int) -> Tensor:
        """Mean over nodes that this process stands for."""
        probs, experts, tokens = given.routing.probs, given.num_experts, given.routing.num_tokens
        if given.context.placement is not None or experts % nodes or tokens % nodes:
            raise ValueError(
                f"nodes={nodes} of loss 'locality' must divide {tokens} tokens and {experts} "
                "experts of one process without other ranks"
            )
        assert probs is not None
        placement = ExpertPlacement.contiguous(experts, nodes, nodes)
        valid = given.routing.valid_mask[:, None]
        sums = probs.masked_fill(~valid, 0.0).view(nodes, -1, probs.shape[1]).sum(1)
        found = [_divergence(own, placement, node, self.epsilon) for node, own in enumerate(sums)]
        return torch.stack(found).mean()


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
    mean = mean_over_valid(routing.probs, routing, node_group, average_ranks=False)
    return _divergence(mean, placement, placement.node_of_rank[rank], epsilon)


def _divergence(mean: Tensor, placement: ExpertPlacement, node: int, epsilon: float) -> Tensor:
    """Of a node's probabilities [E or more], up to a factor, from its target."""
    target = locality_target(placement, node, epsilon).to(mean)
    mean = mean[: placement.num_experts]  # choices without weights live nowhere
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
