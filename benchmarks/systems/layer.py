"""The layer of this library, with each of its expert backends."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
from torch import Tensor

from benchmarks.systems.base import Built, Problem, System
from etr.moe import MoE, MoEConfig, RoutingContext
from etr.moe.capacity import CapacityConfig, Factor, NoLimit
from etr.moe.experts import EXPERT_BACKENDS
from etr.moe.losses import LossConfig
from etr.moe.routers import RouterConfig


def make_layer(
    problem: Problem,
    router: str | RouterConfig = "token_choice",
    capacity: CapacityConfig | None = None,
    backend: str = "auto",
    kind: type[MoE] = MoE,
) -> MoE:
    """The layer on the problem's own weight tensors; no balance loss, since not all have one."""
    case = problem.case
    config = MoEConfig(
        hidden_size=case.hidden_size,
        intermediate_size=1,
        num_experts=case.num_experts,
        top_k=case.top_k,
        router=router,
        capacity=capacity or NoLimit(),
        losses=LossConfig(aux_alpha=0.0),
        backend=backend,
    )
    layer = kind(config).to(problem.x.device, problem.x.dtype)
    # Built narrow and given the shared weights, which take seconds to draw.
    layer.config = dataclasses.replace(config, intermediate_size=case.intermediate_size)
    layer.experts.gate_up_proj = problem.up
    layer.experts.down_proj = problem.down
    if router == "token_choice":
        layer.router.weight = problem.gate
    return layer.train()


def build(problem: Problem, backend: str) -> Built:
    """The layer with one backend. Padded ones get a capacity of the largest load: no drops."""
    capacity: CapacityConfig | None = None
    if EXPERT_BACKENDS[backend].padded:
        mean = problem.case.num_tokens * problem.case.top_k / problem.case.num_experts
        capacity = Factor(capacity_factor=problem.max_load() / mean)
    layer = make_layer(problem, capacity=capacity, backend=backend)
    return Built(
        call=lambda x: layer(x).hidden_states,
        traced=partial(traced, layer),
        up=[problem.up],
        down=[problem.down],
        other=[problem.gate],
        default=backend == default_backend(problem),
    )


def traced(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The stages of the layer's forward one by one, to read the combine weights."""
    routing, limit = layer.route(x, RoutingContext())
    selection = layer.keep(routing, limit).selection
    y = layer.run_experts(x, routing, selection)
    table = selection.combine_weight.new_zeros(routing.num_tokens, routing.num_experts + 1)
    table = table.index_put((routing.token, routing.expert), selection.combine_weight)
    return y, table[:, : routing.num_experts]


@torch.no_grad()
def default_backend(problem: Problem) -> str:
    """What `backend="auto"` stands for on this problem."""
    layer = make_layer(problem)
    routing, limit = layer.route(problem.x, RoutingContext())
    return layer.backend_for(routing, layer.keep(routing, limit).selection).name


LAYERS = tuple(
    System(
        name=f"etr {name}",
        kind="ours",
        summary=f"this library, linear router, dropless: {backend.summary}",
        build=partial(build, backend=name),
        package="etr-moe",
        unavailable=backend.unavailable,
    )
    for name, backend in EXPERT_BACKENDS.items()
    if name != "by_row"  # copies an expert's weights for each row: no case has experts so narrow
)
