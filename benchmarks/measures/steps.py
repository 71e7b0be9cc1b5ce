"""One timed step, forward and backward, and the loop around several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.results import STEP
from benchmarks.rounds import Seconds, interleaved, now, plan_rounds
from benchmarks.systems.base import Built

OnNote = Callable[[str], None]


def step(
    call: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    leaves: Sequence[Tensor],
) -> Seconds:
    """Run forward, then backward; gradients are dropped outside the timed part.

    The forward is that of training: it records the graph.
    """
    device = inputs[0].device
    inputs = [t.detach().requires_grad_() for t in inputs]
    began = now(device)
    outputs = call(*inputs)
    middle = now(device)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.backward(outputs, list(upstream))
    ended = now(device)
    for leaf in leaves:
        leaf.grad = None
    return {"forward": middle - began, STEP: ended - began}


def reason_of(error: Exception) -> str:
    """Why something has no time, in a line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def step_of(built: Built, x: Tensor, upstream: Tensor) -> Callable[[], Seconds]:
    """A system's step on its own inputs or on the problem's."""
    inputs, grads = built.inputs or ([x], [upstream])
    return lambda: step(built.call, inputs, grads, built.leaves)


def run_rounds(
    steps: dict[str, Callable[[], Seconds]],
    budget: float,
    on_note: OnNote,
    expected: Seconds | None = None,
) -> dict[str, dict[str, list[float | None]]]:
    """Interleaved rounds within a budget.

    Args:
        steps: by system.
        budget: seconds.
        on_note: told about progress.
        expected: seconds of a step of each; by default one step of each is run, not counted.
    """
    if not steps:
        return {}
    expected = expected or {name: max(one().values()) for name, one in steps.items()}
    return interleaved(
        steps, plan_rounds(expected, budget), lambda done, all_: on_note(f"round {done} of {all_}")
    )
