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
from etr.moe.routing import Replay
from etr.moe.watch import LayerView, watch

Choices = dict[int, Tensor]
"""Choices of one forward, by MoE layer: experts int64 [T, k] of the T tokens, batch-major;
``num_experts`` marks a place without a choice (padding)."""
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
    capacities or thresholds still decide what experts keep.

    Args:
        model: an `EtrForCausalLM`, or a wrapper of one.
        choices: of `record_choices`, or of `join_choices`; one entry a forward.
    Raises:
        ValueError: `model` holds no `EtrForCausalLM`, layers are missing from an entry, or there
            are more forwards than entries (in the block), or fewer (at its end).
    """
    layers = {layer.layer_index for layer in moe_layers(model)}
    for number, entry in enumerate(choices):
        if set(entry) != layers:
            raise ValueError(
                f"choices[{number}] has MoE layers {sorted(entry)}; the model has {sorted(layers)}"
            )
    done = 0

    def give(context: RoutingContext) -> RoutingContext:
        nonlocal done
        if done == len(choices):
            raise ValueError(f"choices has {len(choices)} entries, and this is forward {done + 1}")
        done += 1
        return replace(context, replay={i: Replay(expert=e) for i, e in choices[done - 1].items()})

    with _prepared(model, give):
        yield
    if done != len(choices):
        raise ValueError(f"choices has {len(choices)} entries, but the model ran {done} times")


def join_choices(choices: Sequence[Choices], batch_size: int) -> Choices:
    """Choices of several forwards over the same rows as those of one forward over all tokens.

    What `generate` chose in a prefill and single tokens becomes what training needs for the whole
    sequences. Without beams, whose rows change places.

    Args:
        choices: of a forward and what continued it with a cache, in order.
        batch_size: rows B of each forward.
    Raises:
        ValueError: no entry, or one whose tokens do not make B rows.
    """
    if not choices:
        raise ValueError("choices is empty; give the entries of at least one forward")
    joined = {}
    for layer in choices[0]:
        parts = []
        for number, entry in enumerate(choices):
            tokens, k = entry[layer].shape
            if tokens % batch_size:
                raise ValueError(
                    f"choices[{number}] has {tokens} tokens, no multiple of batch_size={batch_size}"
                )
            parts.append(entry[layer].view(batch_size, -1, k))
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
