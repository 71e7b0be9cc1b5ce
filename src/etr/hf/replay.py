"""Record which experts tokens choose, and make another run choose the same.

For reinforcement learning, where the policy that is trained must route as the one that generated,
and to compare systems on equal routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from etr.hf.modeling import EtrForCausalLM
from etr.moe import RoutingContext, moe_layers
from etr.moe.context import Replay
from etr.moe.watch import LayerView, watch

Choices = dict[int, Tensor]
"""Choices of one forward, by MoE layer: experts [T, k] of the T tokens, batch-major. What is
recorded is int64, with ``num_experts`` in a place without a choice (padding); see
`etr.moe.routing.Replay` for what is taken."""
Prepare = Callable[[RoutingContext], RoutingContext]


@contextmanager
def record_choices(model: nn.Module) -> Iterator[list[Choices]]:
    """Record the choices of every forward of `model`, one entry a forward.

        with record_choices(model) as choices:
            model.generate(ids, max_new_tokens=8)  # a prefill and seven single tokens

    Tokens' choices are recorded, not what experts keep of them; where experts choose, what they
    took. A forward that is run again for the backward pass is recorded once.

    Args:
        model: an `EtrForCausalLM`, or a wrapper of one.
    Raises:
        ValueError: `model` holds no `EtrForCausalLM`, or several.
    """
    choices: list[Choices] = []

    def begin(context: RoutingContext) -> RoutingContext:
        choices.append({})
        return context

    def see(place: int, view: LayerView) -> None:
        # Under activation checkpointing a layer runs again, after its own forward has ended.
        if choices:
            choices[-1].setdefault(view.layer.layer_index, choices_of(view))

    with _prepared(model, begin), watch(model, see):
        yield choices


@contextmanager
def replay_choices(model: nn.Module, choices: Sequence[Choices]) -> Iterator[None]:
    """Make the next ``len(choices)`` forwards of `model` choose as recorded.

    Weights of the chosen experts and losses stay the router's own, with their gradients, and
    capacities or thresholds still decide what experts keep. Choices are checked here, once, so that
    no forward waits for the device.

    Args:
        model: an `EtrForCausalLM`, or a wrapper of one.
        choices: of `record_choices`, of `join_choices`, or of another engine; one entry a forward.
            Any integers; [B, S, k] is taken too; -1 marks a token without a choice, as
            ``num_experts`` does; k need not be the model's: weights are then made up of these
            choices, and capacities remain those of the model's own k.
    Raises:
        TypeError: choices are not tensors.
        ValueError: `model` holds no `EtrForCausalLM`, layers are missing from an entry, choices
            are not integers or not of experts, or there are more forwards than entries (in the
            block), or fewer (at its end).
    """
    num_experts = {layer.layer_index: layer.config.num_choices for layer in moe_layers(model)}
    given = []
    for number, entry in enumerate(choices):
        if set(entry) != set(num_experts):
            raise ValueError(
                f"choices[{number}] has MoE layers {sorted(entry)}; the model has "
                f"{sorted(num_experts)}"
            )
        given.append(
            {
                layer: Replay(expert=expert).checked(
                    num_experts[layer], f"choices[{number}][{layer}]"
                )
                for layer, expert in entry.items()
            }
        )
    done = 0

    def give(context: RoutingContext) -> RoutingContext:
        nonlocal done
        if done == len(given):
            raise ValueError(f"choices has {len(given)} entries, and this is forward {done + 1}")
        done += 1
        return replace(context, replay=given[done - 1])

    with _prepared(model, give):
        yield
    if done != len(given):
        raise ValueError(f"choices has {len(given)} entries, but the model ran {done} times")


def join_choices(choices: Sequence[Choices], batch_size: int) -> Choices:
    """Choices of several forwards over the same rows as those of one forward over all tokens.

    What `generate` chose in a prefill and single tokens becomes what training needs for the whole
    sequences. Without beams, whose rows change places.

    Args:
        choices: of a forward and what continued it with a cache, in order.
        batch_size: rows B of each forward.
    Raises:
        ValueError: no entry, entries of other layers or of another k, or one whose tokens do not
            make B rows.
    """
    if not choices:
        raise ValueError("choices is empty; give the entries of at least one forward")
    joined = {}
    for layer, first in choices[0].items():
        parts = []
        for number, entry in enumerate(choices):
            if set(entry) != set(choices[0]) or entry[layer].shape[-1] != first.shape[-1]:
                raise ValueError(
                    f"choices[{number}] has other layers, or another number of experts a token, "
                    "than choices[0]"
                )
            tokens = entry[layer].flatten(0, -2)
            if len(tokens) % batch_size:
                raise ValueError(
                    f"choices[{number}] has {len(tokens)} tokens, which is not a multiple of "
                    f"batch_size={batch_size}"
                )
            parts.append(tokens.view(batch_size, -1, first.shape[-1]))
        joined[layer] = torch.cat(parts, dim=1).flatten(0, 1)
    return joined


def choices_of(view: LayerView) -> Tensor:
    """Experts that a layer's tokens chose, int64 [T, k]; [T, E] where experts choose."""
    routing = view.routing
    expert = routing.expert
    if not routing.tokens_choose:
        expert = torch.where(view.selection.kept, expert, routing.num_experts)
    return expert.view(routing.num_tokens, -1).detach()


@contextmanager
def _prepared(model: nn.Module, prepare: Prepare) -> Iterator[None]:
    """Let `prepare` see the context of each forward of the one `EtrForCausalLM` in `model`."""
    found = [module for module in model.modules() if isinstance(module, EtrForCausalLM)]
    if len(found) != 1:
        raise ValueError(
            f"model of class {type(model).__name__} holds {len(found)} EtrForCausalLM; it must "
            "hold one"
        )
    found[0].prepare_context.append(prepare)
    try:
        yield
    finally:
        found[0].prepare_context.remove(prepare)
