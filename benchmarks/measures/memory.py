"""Saved and peak bytes of the layer at several capacities, and of the block that it replaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.measures.steps import OnNote, run_rounds, step
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.results import Row
from benchmarks.rounds import Seconds
from benchmarks.settings import Settings
from benchmarks.systems import SYSTEMS, Problem, make_problem
from benchmarks.systems.layer import make_layer
from etr.moe import MoE
from etr.moe.capacity import Factor, NoLimit

PADDED, TIGHT = "etr padded, factor 1.1", "etr ragged, factor 0.6"
FACTORS = {"factor 1.1": Factor(), "factor 0.6": Factor(capacity_factor=0.6)}
RIVAL = "transformers grouped_mm"


def measure_memory(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of the layer with its own router: padded and ragged at two capacities, dropless."""
    problem = make_problem(case, settings.device)
    layers = {
        f"etr {kind}, {name}": make_layer(problem, "etr", capacity, backend)
        for kind, backend in (("padded", "bmm"), ("ragged", "auto"))
        for name, capacity in FACTORS.items()
    }
    layers["etr, dropless"] = make_layer(problem, "etr", NoLimit())
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        name: partial(output_of, layer) for name, layer in layers.items()
    }
    rival = SYSTEMS[RIVAL]
    refused = rival.missing(settings.device)
    if not refused:
        calls[RIVAL] = rival.build(problem).call  # type: ignore[assignment]
    leaves = [problem.gate, *(p for layer in layers.values() for p in layer.parameters())]
    steps: dict[str, Callable[[], Seconds]] = {
        name: partial(step, call, [problem.x], [problem.upstream], leaves)
        for name, call in calls.items()
    }
    found = run_rounds(steps, case.budget, on_note)
    rows = []
    for name, call in calls.items():
        on_note(f"bytes of {name}")
        x = problem.x.detach().requires_grad_()
        _, saved = saved_bytes(partial(call, x), leaves)
        asked = case.num_tokens * case.top_k
        kept = asked if name == RIVAL else kept_pairs(layers[name], problem)
        rows.append(
            Row(
                system=name,
                kind="rival" if name == RIVAL else "ours",
                default=name == "etr, dropless",
                seconds=found[name],
                kept_pairs=kept,
                drop_rate=1 - kept / asked,
                saved_bytes=saved,
                peak_bytes=peak_bytes(steps[name], settings.device),
                version=rival.version if name == RIVAL else "",
            )
        )
    return rows


def output_of(layer: MoE, x: Tensor) -> Tensor:
    """The layer as a plain function."""
    return layer(x).hidden_states


def kept_pairs(layer: MoE, problem: Problem) -> int:
    """Pairs that the experts compute."""
    return int(layer(problem.x).stats["num_tokens_per_expert"].sum())
