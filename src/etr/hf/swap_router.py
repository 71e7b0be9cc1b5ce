"""A learned linear router replaced by an ETR one that asks for much the same experts.

A checkpoint's experts were taught by the rows of its router's weight W = S U, with S symmetric and
positive definite. ETR needs orthonormal directions: U, the nearest. What S did to the lengths of
the logits, a temperature fitted on sample text restores as far as one number a layer can.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.hf.layer_options import store_options
from etr.hf.modeling import EtrForCausalLM
from etr.moe import moe_layers
from etr.moe.affinity import cosine_affinity, router_dtype
from etr.moe.capacity import CapacityConfig
from etr.moe.config import parse_capacity
from etr.moe.polar import condition_number, polar_factor
from etr.moe.routers import Router
from etr.moe.routers.etr import EtrRouter
from etr.moe.routers.token_choice import LinearRouter
from etr.moe.select import top_experts
from etr.moe.watch import LayerView, watch

FIT_STEPS = 50
"""Most iterations of the fit of a layer's temperature."""


@dataclass(frozen=True, kw_only=True)
class LayerSwap:
    """What the swap means to one MoE layer, on the sample text and the original's hidden states."""

    changed_tokens: float
    """Share of tokens that choose another set of experts."""
    changed_pairs: float
    """Share of choices that differ."""
    temperature: float
    """Temperature that was fitted, no unit."""
    offset: float
    """Bias that was fitted, added to the logits of a sigmoid gate; 0 otherwise."""
    condition: float
    """Largest over smallest singular value of the old weight; 1 changes no choice."""


@dataclass(frozen=True, kw_only=True)
class SwapReport:
    """What the swap means to a model."""

    layers: tuple[LayerSwap, ...]
    """Each MoE layer."""
    num_tokens: int
    """Valid tokens of the sample text."""

    @property
    def changed_tokens(self) -> float:
        """Share of (token, layer) pairs that choose another set of experts."""
        return sum(layer.changed_tokens for layer in self.layers) / len(self.layers)


@torch.no_grad()
def swap_router(
    model: EtrForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    capacity: str | CapacityConfig = "factor",
    fit: bool = True,
) -> SwapReport:
    """Replace the linear routers of `model` by ETR ones with orthonormal directions, in place.

    Experts, attention and everything else stay. Biases and groups of the old router are lost, which
    the report counts among the changed choices. Thresholds are not calibrated here, so that the
    model evaluates dropless until `etr.evaluate.calibrate` has run.

    Args:
        model: with routers `token_choice`, e.g. from `convert`.
        batches: sample text as arguments of the model's forward (input_ids, attention_mask).
        capacity: policy of the new layers.
        fit: set the fitted temperatures; otherwise they start at sqrt(hidden_size), and
            `set_temperatures` can follow.
    Raises:
        ValueError: another router, more experts than hidden dimensions, or no tokens to fit on.
    """
    seen = [_Sample(_linear(layer.router)) for layer in moe_layers(model)]
    policy = parse_capacity(capacity) if isinstance(capacity, str) else capacity
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with watch(model, lambda place, view: seen[place].add(view)):
        for batch in batches:
            model(**{name: value.to(device) for name, value in batch.items()})
    if not seen or not seen[0].num_tokens:
        raise ValueError("batches hold no token: there is nothing to fit temperatures on")
    report = SwapReport(
        layers=tuple(sample.result() for sample in seen), num_tokens=seen[0].num_tokens
    )
    for layer in moe_layers(model):
        old = _linear(layer.router)
        router = EtrRouter(frame="orthonormal", gate=old.config.gate)
        layer.reconfigure(router=router, capacity=policy, rank_by=None)
        factor = polar_factor(router_dtype(old.weight))
        layer.router.get_parameter("weight").copy_(factor)
    store_options(model)
    model.train(was_training)
    if fit:
        set_temperatures(model, report)
    return report


@torch.no_grad()
def set_temperatures(model: EtrForCausalLM, report: SwapReport) -> None:
    """Write the temperatures that `swap_router` fitted into the routers of `model`."""
    for layer, found in zip(moe_layers(model), report.layers, strict=True):
        parameters = dict(layer.router.named_parameters())
        parameters["log_temperature"].fill_(math.log(found.temperature))
        if "offset" in parameters:
            parameters["offset"].fill_(found.offset)


class _Sample:
    """What one layer's old router said about the sample text, and what the new one would."""

    def __init__(self, router: LinearRouter) -> None:
        self.gate = router.config.gate
        self.top_k = router.top_k
        self.condition = condition_number(router.weight)
        self.directions = polar_factor(router_dtype(router.weight))
        self.gates: list[Tensor] = []
        self.affinity: list[Tensor] = []
        self.num_tokens = self.changed_tokens = self.changed_pairs = 0

    def add(self, view: LayerView) -> None:
        valid, logits = view.routing.valid_mask, view.routing.logits
        assert logits is not None
        x = router_dtype(view.x[valid])
        affinity = cosine_affinity(x, self.directions.to(x.dtype), unit=True)
        old = view.routing.routing_map()[valid]
        new = torch.zeros_like(old).scatter(1, top_experts(affinity, self.top_k), True)
        lost = (old & ~new).sum(-1)
        self.num_tokens += len(x)
        self.changed_tokens += int((lost > 0).sum())
        self.changed_pairs += int(lost.sum())
        logits = logits[valid]
        gates = logits.softmax(-1) if self.gate == "softmax" else logits.sigmoid()
        self.gates.append(gates.float())
        self.affinity.append(affinity.float())

    def result(self) -> LayerSwap:
        affinity, gates = torch.cat(self.affinity).double(), torch.cat(self.gates).double()
        temperature, offset = fit_gate(affinity, gates, self.gate, math.sqrt(self.width))
        return LayerSwap(
            changed_tokens=self.changed_tokens / self.num_tokens,
            changed_pairs=self.changed_pairs / (self.num_tokens * self.top_k),
            temperature=temperature,
            offset=offset,
            condition=self.condition,
        )

    @property
    def width(self) -> int:
        """Hidden size."""
        return self.directions.shape[1]


@torch.enable_grad()
def fit_gate(affinity: Tensor, gates: Tensor, kind: str, start: float) -> tuple[float, float]:
    """Temperature, and for a sigmoid an offset, that bring new gates nearest to old ones.

    Nearest in cross-entropy, which is convex in both.

    Args:
        affinity: cosines [T, E].
        gates: of the old router, [T, E].
        kind: softmax or sigmoid.
        start: temperature to begin with.
    Returns:
        Temperature and offset (0 for a softmax).
    """
    log_temperature = affinity.new_tensor(math.log(start), requires_grad=True)
    offset = affinity.new_zeros((), requires_grad=True)
    fitted = torch.optim.LBFGS(
        [log_temperature, offset], max_iter=FIT_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        fitted.zero_grad()
        logits = affinity * log_temperature.exp() + offset
        if kind == "softmax":
            value = -(gates * logits.log_softmax(-1)).sum(-1).mean()
        else:
            value = F.binary_cross_entropy_with_logits(logits, gates)
        value.backward()
        return value

    fitted.step(loss)
    temperature = float(log_temperature.detach().exp())
    return temperature, float(offset.detach()) if kind == "sigmoid" else 0.0


def _linear(router: Router) -> LinearRouter:
    if not isinstance(router, LinearRouter):
        raise ValueError(
            f"router {router.config.name!r} cannot be swapped: only linear ones (token_choice) "
            "have directions that experts were taught by"
        )
    return router
