"""Expert weights and the feed-forward they define."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe.experts.activation import Activation


@dataclass(frozen=True, kw_only=True)
class ExpertParams:
    """Weights of all local experts in the dtype of the computation.

    Args:
        up: gate and up projections [E, 2I, H] for swiglu (gate first), else [E, I, H].
        down: [E, H, I].
        activation: name in `ACTIVATIONS`.
    """

    up: Tensor
    down: Tensor
    activation: Activation


class ExpertWeights(nn.Module):
    """Parameters of E feed-forward experts.

    ``gate_up_proj`` [E, 2I, H] (swiglu) or ``up_proj`` [E, I, H], and ``down_proj`` [E, H, I].

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: swiglu, gelu or relu2 (squared ReLU).
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, activation: Activation
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        width = 2 * intermediate_size if activation == "swiglu" else intermediate_size
        up = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.register_parameter(self.up_name, up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    @property
    def up_name(self) -> str:
        """Name of the first projection's parameter."""
        return "gate_up_proj" if self.activation == "swiglu" else "up_proj"

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]

    def reset_parameters(self) -> None:
        """Normal init with variance 1 / fan-in, per expert."""
        for weight in (self.get_parameter(self.up_name), self.down_proj):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def params(self, dtype: torch.dtype) -> ExpertParams:
        """Weights converted to the dtype of the computation."""
        up = self.get_parameter(self.up_name)
        return ExpertParams(
            up=up.to(dtype), down=self.down_proj.to(dtype), activation=self.activation
        )
