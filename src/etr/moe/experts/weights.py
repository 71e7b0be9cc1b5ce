"""Expert weights and the feed-forward they define."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etr.moe.experts.activation import CLAMP, GATED, Activation, Clamp


@dataclass(frozen=True, kw_only=True)
class ExpertParams:
    """Weights of all local experts in the dtype of the computation.

    Args:
        up: gate and up projections [E, 2I, H] where gated (gate first), else [E, I, H].
        down: [E, H, I].
        activation: name in `ACTIVATIONS`.
        up_bias: [E, 2I] or [E, I], or None.
        down_bias: [E, H], or None.
        clamp: numbers of a clamped activation.
    """

    up: Tensor
    down: Tensor
    activation: Activation
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    clamp: Clamp = CLAMP


class ExpertWeights(nn.Module):
    """Parameters of E feed-forward experts.

    ``gate_up_proj`` [E, 2I, H] (gated) or ``up_proj`` [E, I, H], and ``down_proj`` [E, H, I]; with
    biases also ``gate_up_proj_bias`` [E, 2I] or ``up_proj_bias`` [E, I], and ``down_proj_bias``
    [E, H].

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        activation: name in `ACTIVATIONS`.
        bias: whether both projections have biases.
        clamp: numbers of a clamped activation.
    """

    down_proj_bias: Tensor | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        bias: bool = False,
        clamp: Clamp = CLAMP,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.clamp = clamp
        width = 2 * intermediate_size if activation in GATED else intermediate_size
        up = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.register_parameter(self.up_name, up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for name, size in ((self.up_name, width), ("down_proj", hidden_size)):
            value = nn.Parameter(torch.empty(num_experts, size)) if bias else None
            self.register_parameter(f"{name}_bias", value)
        self.reset_parameters()

    @property
    def up_name(self) -> str:
        """Name of the first projection's parameter."""
        return "gate_up_proj" if self.activation in GATED else "up_proj"

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]

    def reset_parameters(self) -> None:
        """Normal init with variance 1 / fan-in, per expert; biases start at 0.

        An expert of width 0 has nothing to start.
        """
        for name, weight in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                nn.init.zeros_(weight)
            elif weight.numel():
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor, dtype: torch.dtype, run: Callable[..., Any]) -> Any:
        """``run(x, params)``: weights that FSDP shards are whole inside of this call alone."""
        return run(x, self.params(dtype))

    def weights(self) -> list[tuple[str, nn.Parameter]]:
        """The experts' own parameters by name, [E, ...]."""
        names = (self.up_name, f"{self.up_name}_bias", "down_proj", "down_proj_bias")
        values = ((name, getattr(self, name)) for name in names)
        return [(name, value) for name, value in values if value is not None]

    @property
    def size_of_one(self) -> float:
        """Parameters of one expert, those on other ranks too."""
        return sum(value.numel() for _, value in self.weights()) / self.num_experts

    def params(self, dtype: torch.dtype) -> ExpertParams:
        """Weights of this rank's experts, converted to the dtype of the computation."""
        # By attribute: adapters put plain tensors in the place of parameters.
        up_bias, down_bias = getattr(self, f"{self.up_name}_bias"), self.down_proj_bias
        return ExpertParams(
            up=_local(getattr(self, self.up_name)).to(dtype),
            down=_local(self.down_proj).to(dtype),
            activation=self.activation,
            up_bias=None if up_bias is None else _local(up_bias).to(dtype),
            down_bias=None if down_bias is None else _local(down_bias).to(dtype),
            clamp=self.clamp,
        )


def _local(weight: Tensor) -> Tensor:
    """This rank's experts: the whole tensor, unless it is a DTensor."""
    return weight.to_local() if hasattr(weight, "to_local") else weight
