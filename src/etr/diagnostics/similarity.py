"""How alike experts are, and how alike tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.experts import EXPERT_BACKENDS

if TYPE_CHECKING:
    from etr.moe import MoE


@torch.no_grad()
def expert_outputs(layer: MoE, x: Tensor) -> Tensor:
    """What every routed expert of `layer` makes of every token, before any weight.

    Args:
        layer: the layer; its shared experts are left out.
        x: tokens, float [N, H].
    Returns:
        [E, N, H].
    """
    found = []
    for part in layer.bank.parts:
        counts = torch.full((part.num_experts,), len(x), dtype=torch.int64, device=x.device)
        rows = x.expand(part.num_experts, *x.shape)
        found.append(EXPERT_BACKENDS["bmm"].run(rows, counts, part.params(x.dtype)))
    return torch.cat(found)


@torch.no_grad()
def expert_similarity(outputs: Tensor) -> Tensor:
    """Cosine between experts' outputs on the same tokens, mean over tokens.

    1 off the diagonal means that two experts do the same, 0 that they have nothing in common.

    Args:
        outputs: of `expert_outputs`, float [E, N, H].
    Returns:
        float64 [E, E] in [-1, 1], symmetric; an output of zero has cosine 0 with all, itself
        included; zeros where there is no token.
    """
    _, num_tokens, _ = outputs.shape
    unit = F.normalize(outputs.double(), dim=-1)
    return torch.einsum("anh,bnh->ab", unit, unit) / max(num_tokens, 1)


@torch.no_grad()
def token_correlation(x: Tensor) -> Tensor:
    """Correlation of every two tokens over their features.

    Args:
        x: tokens, float [N, H].
    Returns:
        float64 [N, N] in [-1, 1], symmetric; a token whose features are all equal has 0 with all,
        itself included.
    """
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    # What rounding leaves of equal features is no direction.
    centred = centred.masked_fill(
        centred.norm(dim=-1, keepdim=True) <= 1e-12 * x.norm(dim=-1, keepdim=True), 0.0
    )
    unit = F.normalize(centred, dim=-1, eps=1e-300)
    return unit @ unit.T
