"""GShard's one-hot einsums (arXiv 2006.16668), plainly: all tokens are one group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Case
from benchmarks.systems.base import Built, Problem, System, linear_routing

MOST_BYTES = 2e9


def build(problem: Problem) -> Built:
    """Dispatch and combine by tables [T, E, C]; C is the largest load, so nothing is dropped."""
    capacity = problem.max_load()

    def traced(x: Tensor) -> tuple[Tensor, Tensor]:
        combine = one_hot_table(x, problem.gate, problem.case.top_k, capacity)
        rows = torch.einsum("tec,th->ech", (combine != 0).to(x.dtype), x)
        gate, value = torch.einsum("ech,eih->eci", rows, problem.up).chunk(2, dim=-1)
        rows = torch.einsum("eci,ehi->ech", F.silu(gate) * value, problem.down)
        return torch.einsum("tec,ech->th", combine, rows), combine.sum(-1)

    return Built(
        call=lambda x: traced(x)[0],
        traced=traced,
        up=[problem.up],
        down=[problem.down],
        other=[problem.gate],
    )


def one_hot_table(x: Tensor, gate: Tensor, top_k: int, capacity: int) -> Tensor:
    """Combine weights [T, E, C]: one place for every kept pair."""
    index, weight = linear_routing(x, gate, top_k)
    chosen = F.one_hot(index, gate.shape[0])
    place = chosen.flatten(0, 1).cumsum(0).view_as(chosen) - 1
    place = (place * chosen).sum(-1)
    kept = (place < capacity).to(weight.dtype)
    slot = F.one_hot(place.clamp_max(capacity - 1), capacity)
    expert = chosen * (weight * kept)[..., None]
    return torch.einsum("tke,tkc->tec", expert.to(x.dtype), slot.to(x.dtype))


def refuses(case: Case) -> str:
    """Four tables of T * E * C are alive at once."""
    mean = case.num_tokens * case.top_k / case.num_experts
    size = 4 if case.dtype == "float32" else 2
    need = 4 * size * case.num_tokens * case.num_experts * 1.4 * mean
    return f"would need {need / 1e9:.0f} GB of one-hot tables" if need > MOST_BYTES else ""


GSHARD = System(
    name="GShard one-hot",
    kind="rival",
    summary="one-hot dispatch and combine einsums over one group of all tokens, written plainly",
    build=build,
    refuses=refuses,
)
