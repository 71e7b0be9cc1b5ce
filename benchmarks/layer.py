"""The layer, forward and backward, against the floor of its own matrix products and against the
transformers block that it replaces."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Timing, interleaved
from etr import MoE, MoEConfig
from etr.moe import EXPERT_BACKENDS
from etr.moe.experts import activate

FLOOR = "dense floor"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one comparison; all systems route with the same learned linear router."""

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


CASES = (
    Case(name="8 experts top-1", num_tokens=4096, hidden_size=512, intermediate_size=1408,
         num_experts=8, top_k=1),
    Case(name="8 experts top-2", num_tokens=2048, hidden_size=512, intermediate_size=1408,
         num_experts=8, top_k=2),
    Case(name="64 experts top-8", num_tokens=1024, hidden_size=512, intermediate_size=256,
         num_experts=64, top_k=8),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class System:
    """A module and how to call it on tokens [T, H]."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the page."""

    case: str
    system: str
    kept_pairs: int
    drop_rate: float
    timing: Timing | None
    refused: str


def measure(case: Case, rounds: int, seed: int = 0) -> list[Measured]:
    """Check every system against the loop backend, then time those that pass.

    Args:
        case: sizes.
        rounds: counted rounds.
        seed: of weights and tokens.
    """
    torch.manual_seed(seed)
    config = MoEConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=case.num_experts,
        top_k=case.top_k,
        router="token_choice",
        capacity="none",
        backend="loop",
    )
    layer = MoE(config)
    x = torch.randn(case.num_tokens, case.hidden_size)
    upstream = torch.randn_like(x)
    systems: dict[str, System] = {}
    for name, backend in EXPERT_BACKENDS.items():
        if not backend.padded:  # without a capacity, padding would be to all tokens
            systems[f"etr {name}"] = _ours(layer, name)
    for implementation in ("eager", "grouped_mm"):
        systems[f"transformers {implementation}"] = _theirs(layer, case, implementation)

    expected = _step(systems["etr loop"], x, upstream)
    refused = {
        name: "" if _close(_step(system, x, upstream), expected) else "differs from the reference"
        for name, system in systems.items()
    }
    calls: dict[str, Callable[[], object]] = {FLOOR: _floor(layer, case, x, upstream)}
    for name, system in systems.items():
        if not refused[name]:
            calls[name] = lambda system=system: _step(system, x, upstream)
    timings = interleaved(calls, FLOOR, rounds)
    pairs = case.num_tokens * case.top_k
    return [
        Measured(
            case=case.name,
            system=name,
            kept_pairs=pairs,
            drop_rate=0.0,
            timing=timings.get(name),
            refused=refused.get(name, ""),
        )
        for name in (FLOOR, *systems)
    ]


def _ours(layer: MoE, backend: str) -> System:
    other = copy.deepcopy(layer)
    other.config = dataclasses.replace(layer.config, backend=backend)
    return System(module=other, call=lambda x: other(x).hidden_states)


def _theirs(layer: MoE, case: Case, implementation: str) -> System:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    weights: dict[str, Any] = dict(block.named_parameters())
    router: Any = layer.router
    with torch.no_grad():
        weights["gate.weight"].copy_(router.weight)
        weights["experts.gate_up_proj"].copy_(layer.experts.get_parameter("gate_up_proj"))
        weights["experts.down_proj"].copy_(layer.experts.down_proj)
    # Mixtral renormalises over the chosen, which at top-1 makes every weight 1: not the same work.
    return System(module=block, call=lambda x: block(x[None])[0])


def _floor(layer: MoE, case: Case, x: Tensor, upstream: Tensor) -> Callable[[], object]:
    """One dense feed-forward over as many rows as pairs are kept: the same multiplications."""
    params = layer.experts.params(x.dtype)
    up = params.up[0].detach().clone().requires_grad_()
    down = params.down[0].detach().clone().requires_grad_()
    rows = x.repeat_interleave(case.top_k, 0).requires_grad_()
    grad = upstream.repeat_interleave(case.top_k, 0)

    def call() -> None:
        rows.grad = up.grad = down.grad = None  # as for every system
        (activate(rows @ up.T, params.activation) @ down.T).backward(grad)

    return call


def _step(system: System, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    system.module.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    y = system.call(leaf)
    y.backward(upstream)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def _close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        for a, b in zip(found, expected, strict=True)
    )
