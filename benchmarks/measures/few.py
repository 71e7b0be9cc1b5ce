"""A layer that serves few tokens, against the block of transformers: one forward, no gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.check import TOLERANCE, row_error
from benchmarks.measures.steps import OnNote, run_rounds
from benchmarks.results import Row
from benchmarks.rounds import Seconds, now
from benchmarks.settings import Settings
from benchmarks.systems import SYSTEMS, Problem, make_problem
from benchmarks.systems.layer import make_layer
from benchmarks.systems.transformers_blocks import block_of
from etr.moe import MoE, attach
from etr.moe.capacity import CapacityConfig, Factor, NoLimit
from tools.operations import operations

HF = "transformers grouped_mm"
SAME, OWN = "etr, linear router, dropless", "etr, its own router, dropless"
DROPS = "etr, its own router, thresholds of factor 0.6"
LAYERS: dict[str, tuple[str, CapacityConfig, str]] = {
    SAME: ("token_choice", NoLimit(), "dropless"),
    OWN: ("etr", NoLimit(), "dropless"),
    DROPS: ("etr", Factor(capacity_factor=0.6), "threshold"),
}
"""Router, capacity in training and serving policy of each."""
CALIBRATED_ON = 1024
"""Tokens of the one training step that thresholds are learned in."""
CALLS = {1: 20, 8: 5}
"""Calls that are timed together, by number of tokens; else one."""


def measure_few(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of transformers' block, and of the layer on the same weights and tokens."""
    problem = make_problem(case, settings.device)
    calls: dict[str, Callable[[], Any]] = {}
    refused: dict[str, str] = {}
    rival = SYSTEMS[HF].missing(settings.device)
    if not rival:
        block = block_of(problem, "grouped_mm")
        block.gate.weight = problem.gate
        block.experts.gate_up_proj, block.experts.down_proj = problem.up, problem.down
        block.eval()
        calls[HF] = lambda: block(problem.x[None])[0]
    kept = {}
    for name, (router, capacity, serving) in LAYERS.items():
        on_note(f"making {name}")
        layer = served(problem, router, capacity, serving)
        calls[name] = lambda layer=layer: layer(problem.x).hidden_states  # type: ignore[misc]
        kept[name] = kept_pairs(layer, problem.x)
    with torch.no_grad():
        outputs = {name: call() for name, call in calls.items()}
        counts = {name: len(operations(call)) for name, call in calls.items()}
    if HF in outputs:
        error = row_error(outputs[SAME], outputs[HF].float())
        if error > TOLERANCE[problem.x.dtype]:
            refused[SAME] = f"failed its check: outputs differ by {error:.2g}"
    steps = {n: timed(c, case.num_tokens) for n, c in calls.items() if n not in refused}
    found = run_rounds(steps, case.budget, on_note)
    asked = case.num_tokens * case.top_k
    rows = [
        Row(
            system=name,
            kind="rival" if name == HF else "ours",
            default=name == OWN,
            seconds=found.get(name, {}),
            drop_rate=1 - kept.get(name, asked) / asked,
            operations=counts[name],
            refused=refused.get(name, ""),
        )
        for name in calls
    ]
    absent = [Row(system=HF, kind="rival", refused=rival)] if rival else []
    return [*absent, *rows]


def served(problem: Problem, router: str, capacity: CapacityConfig, serving: str) -> MoE:
    """The layer in eval mode; where it serves by thresholds, after one step that learned them."""
    layer = make_layer(problem, router, capacity)
    if serving == "threshold":
        optimizer = torch.optim.SGD([*layer.router.parameters()], lr=0.0)
        attachment = attach(layer, optimizer, total_steps=1)
        tokens = torch.randn(CALIBRATED_ON, problem.x.shape[1], device=problem.x.device)
        layer(tokens.to(problem.x.dtype)).hidden_states.float().sum().backward()
        optimizer.step()
        attachment.detach()
        for leaf in (*layer.parameters(), problem.up, problem.down, problem.gate):
            leaf.grad = None
    layer.eval_selection = serving
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a dropless layer drops nothing
        return layer.eval()


@torch.no_grad()
def kept_pairs(layer: MoE, x: Tensor) -> int:
    """Pairs that the experts compute."""
    return int(layer(x).stats["num_tokens_per_expert"].sum())


def timed(call: Callable[[], Any], num_tokens: int) -> Callable[[], Seconds]:
    """Seconds of one forward, the mean of several where one is short."""
    count = CALLS.get(num_tokens, 1)

    @torch.no_grad()
    def step() -> Seconds:
        device = call().device  # what ran before has its own weights in the cache
        began = now(device)
        for _ in range(count):
            call()
        return {"forward": (now(device) - began) / count}

    return step
