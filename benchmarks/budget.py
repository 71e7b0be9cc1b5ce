"""Which cases a machine has time for: known before any system runs, and of the machine alone."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.measures.generate import NUM_LAYERS
from benchmarks.rounds import now

TRAINED, SERVED = ("layer", "routing", "growth"), ("few", "generate")
"""Groups whose steps are timed for a ratio: with a backward pass, which multiplies twice as much as
the forward, and without."""
PROBE_ROWS = 256


def too_long(case: Case, device: torch.device) -> str:
    """Why a case is left out, or empty: the products of its experts alone outlast its budget.

    They are taken to run at the rate of one product of as many rows as an expert has, at most 256.
    """
    if device.type != "cpu" or case.group not in (*TRAINED, *SERVED):
        return ""
    seconds = products(case) * seconds_of_a_row(case, device)
    if seconds <= case.budget:
        return ""
    return (
        f"the products of one step alone would take {seconds:.0f} s on this machine, and the "
        f"rounds of all systems have {case.budget:.0f} s"
    )


def products(case: Case) -> float:
    """Rows times matrices of the experts, gate, up and down, in one step."""
    passes = 3 if case.group in TRAINED else 1
    layers = NUM_LAYERS if case.group == "generate" else 1
    return 3.0 * case.num_tokens * case.top_k * passes * layers


def seconds_of_a_row(case: Case, device: torch.device) -> float:
    """Seconds of the product of one row and a matrix [H, I], from the best of three probes."""
    dtype = getattr(torch, case.dtype)
    rows = max(1, min(PROBE_ROWS, int(case.tokens_each)))
    left = torch.ones(rows, case.hidden_size, dtype=dtype, device=device)
    right = torch.ones(case.hidden_size, case.intermediate_size, dtype=dtype, device=device)
    took = []
    for _ in range(3):
        began = now(device)
        left @ right
        took.append(now(device) - began)
    return min(took) / rows
