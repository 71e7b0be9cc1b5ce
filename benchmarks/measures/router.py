"""The router alone: GrAP against a linear router, scores only and with choice and gate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.check import row_error
from benchmarks.measures.steps import OnNote, run_rounds, step
from benchmarks.results import Row
from benchmarks.rounds import Seconds
from benchmarks.settings import Settings
from etr.moe.affinity import grap_affinity, router_dtype
from etr.moe.context import RouterInput
from etr.moe.polar import polar_factor
from etr.moe.routers import ROUTERS, EtrRouter, Router

GRAP, LINEAR = "GrAP scores", "linear scores"
GRAP_ROUTER, LINEAR_ROUTER, ETR_ROUTER = "GrAP router", "linear router", "etr router, default"
ETR_GIVEN = "etr router, its directions given"
DIRECTIONS = "directions of the etr router, once an optimizer step"


def measure_router(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Scores [T, E] of both, then whole routers: scores, gate and choice."""
    torch.manual_seed(0)
    sizes = (case.hidden_size, case.num_experts, case.top_k)
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.num_tokens, case.hidden_size, device=settings.device).to(dtype)
    upstream = torch.randn(case.num_tokens, case.num_experts, device=settings.device)
    linear = ROUTERS["token_choice"]().build(*sizes).to(settings.device, dtype)
    routers = {
        GRAP_ROUTER: EtrRouter(frame="fixed").build(*sizes),
        LINEAR_ROUTER: linear,
        ETR_ROUTER: EtrRouter().build(*sizes),
        ETR_GIVEN: with_given_directions(EtrRouter().build(*sizes).to(settings.device)),
    }
    weight: nn.Parameter = linear.weight
    inputs = RouterInput(
        valid_mask=torch.ones(case.num_tokens, dtype=torch.bool, device=x.device),
        token_ids=None,
        token_index=torch.arange(case.num_tokens, device=x.device),
        step=torch.zeros((), dtype=torch.int64, device=x.device),
        layer_index=0,
    )
    scores: dict[str, Callable[[Tensor], Tensor]] = {
        GRAP: lambda t: grap_affinity(t, case.num_experts),
        LINEAR: lambda t: router_dtype(t) @ router_dtype(weight).T,
    }
    expected = {GRAP: plain_grap(x, case.num_experts), LINEAR: x.float() @ weight.float().T}
    refused = {
        name: "failed its check" if row_error(call(x), expected[name].detach()) > 1e-4 else ""
        for name, call in scores.items()
    }
    gate_grad = upstream[:, 0].contiguous()
    steps: dict[str, Callable[[], Seconds]] = {
        name: partial(step, call, [x], [upstream], [weight])
        for name, call in scores.items()
        if not refused[name]
    }
    for name, router in routers.items():
        router.to(settings.device, dtype)
        steps[name] = partial(
            step, partial(gate_of, router, inputs), [x], [gate_grad], [*router.parameters()]
        )
    matrix = routers[ETR_ROUTER].get_parameter("weight").detach().float()
    toward = torch.randn_like(matrix)
    steps[DIRECTIONS] = partial(step, polar_factor, [matrix], [toward], [])
    found = run_rounds(steps, case.budget, on_note)
    return [
        Row(
            system=name,
            kind="ours",
            default=name == GRAP,
            seconds=found.get(name, {}),
            refused=refused.get(name, ""),
        )
        for name in (*scores, *routers, DIRECTIONS)
    ]


def with_given_directions(router: Router) -> Router:
    """The router with directions for parameters, in place of the matrix they are made of."""
    given = nn.Parameter(polar_factor(router.get_parameter("weight").detach()))
    router.directions = lambda dtype: given.to(dtype)  # type: ignore[method-assign]
    router.register_parameter("weight", given)
    return router


def gate_of(router: Router, inputs: RouterInput, x: Tensor) -> Tensor:
    """Combine weights of the pairs that a whole router chooses."""
    return router(x, inputs).gate


@torch.no_grad()
def plain_grap(x: Tensor, num_experts: int) -> Tensor:
    """Cosines of tokens and block vectors, by the definition, float32 [T, E]."""
    blocks = torch.eye(num_experts, device=x.device)
    blocks = blocks.repeat_interleave(x.shape[1] // num_experts, dim=1)
    norms = x.float().norm(dim=1)[:, None] * blocks.norm(dim=1)
    return x.float() @ blocks.T / norms
