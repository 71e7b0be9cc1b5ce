"""What a system is: who computes the layer, on given weights, and how its routing is read."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cases import Case


@dataclass(frozen=True)
class Problem:
    """One case with its weights and tokens, the same for every system.

    Args:
        case: sizes.
        x, upstream: tokens and gradient of the output, [T, H].
        gate: router weight [E, H].
        up, down: expert weights [E, 2I, H] (gate first) and [E, H, I], leaves that require grad.
    """

    case: Case
    x: Tensor
    upstream: Tensor
    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    @cached_property
    def weight(self) -> Tensor:
        """Combine weights of the common routing, float32 [T, E]; 0 where not chosen."""
        with torch.no_grad():
            index, weight = linear_routing(self.x, self.gate, self.case.top_k)
            return dense_weight(index, weight, self.case.num_experts)

    def max_load(self, group: int | None = None) -> int:
        """Most tokens that choose one expert, within any group of `group` consecutive tokens."""
        chosen = (self.weight != 0).long()
        return int(chosen.view(-1, group or chosen.shape[0], chosen.shape[1]).sum(1).max())


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw weights and tokens."""
    torch.manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    hidden, inner, experts = case.hidden_size, case.intermediate_size, case.num_experts

    def normal(*shape: int, fan_in: int = 1) -> Tensor:
        return torch.randn(*shape, device=device).mul_(fan_in**-0.5).to(dtype)

    return Problem(
        case=case,
        x=normal(case.num_tokens, hidden),
        upstream=normal(case.num_tokens, hidden),
        gate=nn.Parameter(normal(experts, hidden, fan_in=hidden)),
        up=nn.Parameter(normal(experts, 2 * inner, hidden, fan_in=hidden)),
        down=nn.Parameter(normal(experts, hidden, inner, fan_in=inner)),
    )


@dataclass(frozen=True, kw_only=True)
class Built:
    """A system ready to run one problem.

    Args:
        call: the forward: its inputs to the output, or to several outputs.
        up, down: the leaves that receive the expert gradients, stacked or one per expert.
        traced: (output, combine weights [T, E] with their graph) of one call; None where the
            system cannot be checked.
        inputs: (inputs, gradients of the outputs) where they are not the problem's.
        other: leaves beside the expert weights.
        default: the library would pick this itself.
        read_grads: gradients of `up` and `down` to those of [E, 2I, H] and [E, H, I].
    """

    call: Callable[..., Tensor | Sequence[Tensor]]
    up: Sequence[Tensor]
    down: Sequence[Tensor]
    traced: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    inputs: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
    other: Sequence[Tensor] = field(default_factory=list)
    default: bool = False
    read_grads: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]] = (
        lambda up, down: (stacked(up), stacked(down))
    )

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that receives a gradient beside the input."""
        return [*self.up, *self.down, *self.other]


@dataclass(frozen=True, kw_only=True)
class System:
    """A row of the registry.

    Args:
        name: key in SYSTEMS.
        kind: floor, ours or rival.
        summary: one line for the page.
        build: problem to Built; may raise, which is shown as the reason.
        requires: modules to import.
        package: distribution whose version is shown.
        cuda: runs on CUDA alone.
        refuses: why it does not take a case, or empty.
        unavailable: why it cannot run on this machine at all, or None.
    """

    name: str
    kind: str
    summary: str
    build: Callable[[Problem], Built]
    requires: tuple[str, ...] = ()
    package: str = ""
    cuda: bool = False
    refuses: Callable[[Case], str] = lambda case: ""
    unavailable: Callable[[], str | None] = lambda: None

    def missing(self, device: torch.device) -> str:
        """Why it cannot run here, or empty."""
        if self.cuda and device.type != "cuda":
            return "needs a CUDA device"
        reason = self.unavailable()
        if reason is not None:
            return reason
        absent = [name for name in self.requires if importlib.util.find_spec(name) is None]
        return "not installed" if absent else ""

    @property
    def version(self) -> str:
        """Version of its package, or empty."""
        try:
            return importlib.metadata.version(self.package) if self.package else ""
        except importlib.metadata.PackageNotFoundError:
            return ""


def stacked(grads: Sequence[Tensor]) -> Tensor:
    """Gradients of all experts as one tensor: they come so, or one by one."""
    return grads[0] if len(grads) == 1 and grads[0].dim() == 3 else torch.stack(list(grads))


class SwiGLU(nn.Module):
    """One expert as a module of its own, for systems that take a list of them."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up.detach()), nn.Parameter(down.detach())

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.up, self.down)


def swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The feed-forward of one expert."""
    gate, value = F.linear(x, up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * value, down)


def linear_routing(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax of a linear router in float32, top-k; over two or more, weights sum to 1.

    Returns:
        expert int64 [T, k], weight float32 [T, k].
    """
    probs = F.linear(x.float(), gate.float()).softmax(-1)
    weight, index = probs.topk(top_k, dim=-1)
    return index, weight if top_k == 1 else weight / weight.sum(-1, keepdim=True)


def dense_weight(index: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    """Combine weights as a table [T, E] with the graph of `weight`."""
    table = torch.zeros(index.shape[0], num_experts, dtype=weight.dtype, device=weight.device)
    return table.scatter(1, index, weight)


def seen_by(module: nn.Module, call: Callable[[], Tensor]) -> tuple[Tensor, Any]:
    """Run a call and return what it returned and what `module` returned inside it."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda *args: seen.append(args[2]))
    try:
        result = call()
    finally:
        handle.remove()
    return result, seen[-1]
