"""What a `Transform` observes of a model on text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from etr.hf.modeling import EtrForCausalLM
from etr.model.transform import Stats, Transform
from etr.moe import MoE
from etr.moe.watch import NEEDS, LayerView, watch

Batches = Iterable[Mapping[str, Any]]
"""Text as arguments of the model's forward."""
NORM_BEFORE = "post_attention_layernorm"
"""Name, in a decoder layer of every family, of the norm whose output the MoE block takes."""
MULTIPLIER = "residual_multiplier"
"""Name of what some multiply the block's output with before it is added."""
See = Callable[[int, LayerView], None]


def measure(model: EtrForCausalLM, method: Transform, batches: Batches) -> list[Stats]:
    """What a method observes of each MoE layer, gathered over text.

    Args:
        model: in the mode in which it is to be measured. Where gradients are asked for, its
            weights require one afterwards as they did before, and have none.
        method: one that measures, or inspects weights.
        batches: on the model's device; none for a method that inspects alone.
    Raises:
        ValueError: there is no text.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    found: list[Stats] = [{} for _ in layers]
    batches = list(batches) if method.probes else batches

    def see(place: int, view: LayerView) -> None:
        with torch.no_grad():
            found[place] = method.gather(found[place], method.observe(view))

    observes = type(method).observe is not Transform.observe
    of_weights = "weight_gradients" in method.needs and method.measures
    backward = of_weights or "gradients" in method.needs
    needs = [need for need in method.needs if need in NEEDS]
    seen = 0
    with _gradients(model, of_weights, backward), _residuals(model, method, see) as to:
        with watch(model, to if observes else _nothing, needs):
            for batch in batches:
                seen += 1
                if backward:
                    _summed_loss(model, batch).backward()
                else:
                    model(**batch)
        if method.measures and not seen:
            raise ValueError(f"transform {method.name!r} measures on text, and there is none")
        if method.inspects:
            with torch.no_grad():
                for place, layer in enumerate(layers):
                    found[place] = {**found[place], **method.inspect(layer, found[place])}
    if method.probes:
        with torch.no_grad():
            more = method.probe(layers, lambda: mean_loss(model, batches), found)
        found = [{**one, **other} for one, other in zip(found, more, strict=True)]
    return found


def _nothing(place: int, view: LayerView) -> None:
    """For a method that looks at weights alone."""


def _labels(batch: Mapping[str, Any]) -> Tensor:
    """The token after each but the last, [B, S - 1]; -100 on padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return (ids if mask is None else ids.masked_fill(mask == 0, -100))[:, 1:]


def _summed_loss(model: EtrForCausalLM, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the next token, summed over tokens, without what routers add."""
    logits = model(**batch).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), _labels(batch).flatten(), reduction="sum")


def mean_loss(model: EtrForCausalLM, batches: Batches) -> float:
    """The same over all batches, by token."""
    each = [(float(_summed_loss(model, one)), int((_labels(one) >= 0).sum())) for one in batches]
    return sum(loss for loss, _ in each) / max(1, sum(count for _, count in each))


@contextmanager
def _gradients(model: EtrForCausalLM, of_weights: bool, backward: bool) -> Iterator[None]:
    """Gradients of nothing, of activations alone, or of weights too."""
    if not backward:
        with torch.no_grad():
            yield
        return
    before = [(value, value.requires_grad) for value in model.parameters()]
    for value, _ in before:
        value.requires_grad_(of_weights)
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, given, out: out.requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for value, required in before:
            value.requires_grad_(required)
            value.grad = None


@contextmanager
def _residuals(model: EtrForCausalLM, method: Transform, see: See) -> Iterator[See]:
    """`see` with views that hold what the model adds the layer's output to, where it is needed.

    A decoder layer adds the block's output, times its multiplier where it has one, to what its
    second norm takes.
    """
    if "residual" not in method.needs:
        yield see
        return
    taken: list[Tensor] = []
    family = model.config.family
    layers = [layer for layer in model.model.layers if family.is_moe(layer)]

    def hook(multiplier: float) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def take(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            taken.append(given[0].detach() / multiplier)

        return take

    handles = []
    for layer in layers:
        norm = getattr(layer, NORM_BEFORE)
        handles.append(norm.register_forward_pre_hook(hook(getattr(layer, MULTIPLIER, 1.0))))

    def call(place: int, view: LayerView) -> None:
        see(place, replace(view, residual=taken.pop().reshape(view.x.shape)))

    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()
