"""Inner steps of a layer: its experts run again on what they made (arXiv 2506.18945)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from etr.moe.routing import MoEOutput
from etr.moe.stats import Counters, add_stats


def in_steps(steps: Sequence[Callable[[Tensor], MoEOutput]], hidden_states: Tensor) -> MoEOutput:
    """Run inner steps one after the other; each gets tokens and what those before it added.

    Args:
        steps: tokens [..., H] to what is added to them.
        hidden_states: float [..., H].
    Returns:
        What all steps add, the means of their losses and the sums of their counters.
    """
    found: list[MoEOutput] = []
    for step in steps:
        found.append(step(hidden_states))
        hidden_states = hidden_states + found[-1].hidden_states
    names = {name for output in found for name in output.losses}
    losses = {
        name: torch.stack([one.losses[name] for one in found if name in one.losses]).mean()
        for name in sorted(names)
    }
    return MoEOutput(
        hidden_states=reduce(torch.add, (output.hidden_states for output in found)),
        losses=losses,
        stats=Counters(lambda: reduce(add_stats, (output.stats for output in found))),
    )
