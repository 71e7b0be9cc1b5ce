"""Experts of which a token's later choices only scale the first ones (arXiv 2503.00634)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe.experts.activation import GATED, activate
from etr.moe.experts.bank import Bank, BankConfig, Dispatch, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.experts.weights import ExpertParams
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class Compressed(BankConfig):
    """Equal experts, of which a token runs those of its first choices.

    Its other choices scale what these take and what they hold inside, by vectors that each expert
    has beside its weights.
    """

    name = "compressed"
    summary = "equal experts; a token's first choices run, the others scale them by a vector"
    undivided = "choices of one token work together"
    runs_itself = "runs the tokens of each expert by itself"

    main: int = 1
    """Choices that run, the first ones of each token."""
    of: int = 2
    """Choices of a token: the layer's top_k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.main <= self.of:
            raise ValueError(f"main={self.main} must lie between 1 and of={self.of}")

    @property
    def choices_of_a_token(self) -> int | None:
        return self.of

    def build(self, sizes: ExpertSizes) -> Bank:
        if sizes.bias:
            raise ValueError("experts='compressed': experts with biases are not taken")
        return CompressedExperts(sizes, self.main, self.of)


class CompressedExperts(Experts):
    """``vectors`` [E, 2H + I] beside the experts' weights, all 1 at first.

    Of each expert: what scales the input of the gate, H, that of the up projection, H, and what is
    inside, I.

    Args:
        sizes: of the experts.
        main: choices that run.
        of: choices of a token.
    """

    def __init__(self, sizes: ExpertSizes, main: int, of: int) -> None:
        super().__init__(sizes)
        self.main, self.of = main, of
        self.widths = [sizes.hidden_size, sizes.hidden_size, sizes.intermediate_size]
        self.vectors = nn.Parameter(torch.ones(sizes.num_experts, sum(self.widths)))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "vectors"):
            nn.init.ones_(self.vectors)

    def flops(self, num_tokens_per_expert: Tensor) -> Tensor:
        """Of the choices that run, if as many are kept of all ranks."""
        return super().flops(num_tokens_per_expert) * self.main / self.of

    def parameters_of_a_token(self, top_k: int) -> float:
        mains = min(top_k, self.main)
        return self.size_of_one * mains + sum(self.widths) * (top_k - mains)

    def run(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        params: Sequence[ExpertParams],
        dispatch: Dispatch,
    ) -> Tensor:
        (weights,) = params
        count = routing.num_tokens
        if len(routing.token) != count * self.of:
            raise ValueError(
                f"experts='compressed:of={self.of}': tokens must choose of={self.of} experts each "
                f"(top_k), and there are {len(routing.token)} choices of {count} tokens"
            )
        expert = routing.expert.view(count, self.of)
        kept = selection.kept.view(count, self.of)
        weight = torch.where(kept, selection.combine_weight.view(count, self.of), 0.0).to(x.dtype)
        scales = self._scales(expert[:, self.main :], weight[:, self.main :])
        y = x * 0.0  # which has a gradient where nothing runs
        for number in range(self.num_experts):
            mine = kept[:, : self.main] & (expert[:, : self.main] == number)
            token, rank = mine.nonzero(as_tuple=True)
            if len(token):
                own = [scale[token] for scale in scales]
                found = _expert(x[token], weights, number, own)
                y = y.index_add(0, token, weight[token, rank, None] * found)
        return y

    def _scales(self, expert: Tensor, weight: Tensor) -> list[Tensor]:
        """Of each token, [T, H], [T, H] and [T, I]: 1 where no other choice was kept.

        Args:
            expert, weight: of the other choices, [T, A].
        """
        total = weight.sum(1, keepdim=True)
        some = total != 0
        share = torch.where(some, weight / torch.where(some, total, 1.0), 0.0)
        vectors = self.vectors.to(weight.dtype)[expert.clamp_max(self.num_experts - 1)]
        mixed = torch.where(some, (share[:, :, None] * vectors).sum(1), 1.0)
        return list(mixed.split(self.widths, dim=1))


def _expert(x: Tensor, params: ExpertParams, number: int, scales: Sequence[Tensor]) -> Tensor:
    """One expert on tokens [n, H], scaled."""
    of_gate, of_up, inside = scales
    if params.activation in GATED:
        gate, up = params.up[number].chunk(2)
        hidden = torch.cat([(x * of_gate) @ gate.T, (x * of_up) @ up.T], dim=1)
    else:
        hidden = (x * of_up) @ params.up[number].T
    active = activate(hidden, params.activation, params.clamp) * inside
    return active @ params.down[number].T
