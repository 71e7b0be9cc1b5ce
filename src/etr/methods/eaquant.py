"""EAQuant: one scale for router and experts that makes both easy to round (2506.13329)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors, LazyTensor
from etr.model.bits import with_bits
from etr.model.experts import EXPERTS, OfExperts, lists_of
from etr.model.transform import Stats, largest
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.activation import GATED
from etr.moe.experts.packed import BITS, WHOLE, Packed, grid_of, on_grid
from etr.moe.experts.runs import text_of
from etr.moe.layer import MoE
from etr.moe.routers.token_choice import TokenChoice
from etr.moe.view import LayerView
from etr.moe.watch import expert_neurons

SMALLEST = 1e-5
"""What a largest value counts as at least, so that a dead channel has a scale."""
CLIPS = tuple(0.35 + 0.65 * step / 100 for step in range(101))
"""Shares of a row's range that the router's steps may reach."""
SAMPLE = 2048
"""Tokens on which the router's are compared."""


@dataclass(frozen=True, kw_only=True)
class EaQuant(OfExperts):
    """Scales channels so that tokens and weights are even, then rounds experts and router.

    The norm before the layer is divided by one scale for each channel, with which the router's and
    all experts' weights are multiplied; in each expert the linear half of what is inside is treated
    alike. The function stays. The router's weights are then rounded over the share of their range
    that keeps the chosen experts' probabilities best (KL), the experts' over all of it.
    """

    name = "eaquant"
    summary = "even out channels for router and experts together, then round both to few bits"
    takes_norm = True

    alpha: float = 0.6
    """How much of the unevenness of tokens goes into weights."""
    smooth: bool = True
    """Scale channels at all."""
    bits: int = 4
    """Of the experts' weights: 2, 4 or 8, or 16 for none."""
    router_bits: int = 8
    """Of the router's weights, 2 to 8, which are stored as what they mean; 16 for none."""
    store: Literal["packed", "plain"] = "packed"
    """packed: experts as codes in bytes. plain: rounded weights, which families can hold."""
    min_tokens: int = 1
    """Kept tokens below which what is inside an expert is left unscaled."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")
        if self.bits not in (*BITS, WHOLE):
            raise ValueError(f"bits={self.bits} must be one of 2, 4, 8, 16 bits")
        if self.router_bits not in (*range(2, 9), WHOLE):
            raise ValueError(f"router_bits={self.router_bits} must be 2 to 8 bits, or 16")
        if self.store not in ("packed", "plain"):
            raise ValueError(f"store={self.store!r} must be packed or plain")
        if self.protect:
            raise ValueError(f"protect={self.protect!r}: channels are scaled, not experts")

    def changes_function(self) -> str | None:
        if self.bits == self.router_bits == WHOLE:
            return None
        return f"experts have bits={self.bits} a weight, the router router_bits={self.router_bits}"

    def observe(self, view: LayerView) -> Stats:
        x = view.x[view.routing.valid_mask]
        inside = [
            active.abs().amax(0) if len(active) else active.new_zeros(active.shape[1])
            for _, active, _ in expert_neurons(view)
        ]
        return {
            "input": x.abs().amax(0) if len(x) else x.new_zeros(x.shape[1]),
            "inside": torch.stack(inside),
            "tokens": view.selection.num_tokens_per_expert,
            "sample": x[:SAMPLE],
        }

    def gather(self, total: Stats, more: Stats) -> Stats:
        if not total:
            return more
        peaks = {name: more[name] for name in ("input", "inside")}
        return {
            **largest(total, peaks),
            "tokens": total["tokens"] + more["tokens"],
            "sample": torch.cat([total["sample"], more["sample"]])[:SAMPLE],
        }

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        assert isinstance(layer, MoE)
        if type(layer.config.router_config) is not TokenChoice:
            name = layer.config.router_config.name
            raise ValueError(f"transform {self.name!r} takes token_choice, not router {name!r}")
        params = layer.bank.parts[0].params(torch.float32)
        router = layer.router.get_parameter("weight").float()
        readers = [router, *params.up]
        if layer.shared_experts is not None:
            readers += [*layer.shared_experts.params(torch.float32).up]
        scales = [scale_of(stats["input"].float(), w.abs().amax(0), self.alpha) for w in readers]
        scale = torch.stack(scales).amax(0) if self.smooth else torch.ones_like(scales[0])
        inside = scale_of(stats["inside"].float(), params.down.abs().amax(1), self.alpha)
        unseen = stats["tokens"].to(inside.device) < self.min_tokens
        inside = torch.where(unseen[:, None], torch.ones_like(inside), inside)
        if not self.smooth or params.activation != "swiglu":
            inside = torch.ones_like(inside)
        x, clip = stats["sample"].float() / scale, 1.0
        if self.router_bits < WHOLE:
            top_k, bits = layer.config.top_k, self.router_bits
            losses = [divergence(x, router * scale, bits, share, top_k) for share in CLIPS]
            clip = CLIPS[min(reversed(range(len(CLIPS))), key=losses.__getitem__)]  # wide if level
        return {
            "scale": scale,
            "scale_inside": inside,
            "clip": torch.tensor(clip, dtype=torch.float64),
        }

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        names = {"input": "scale", "inside": "scale_inside", "clip": "clip"}
        return {new: [one[old].tolist() for one in stats] for new, old in names.items()}

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        highest = max(max(scales) for scales in plan["input"])
        clips = ", ".join(f"{clip:.2f}" for clip in plan["clip"])
        return f"scales channels by up to {highest:.3g}; routers reach {clips} of their range"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        clips = lists_of(plan, "clip", layers)
        both = zip(lists_of(plan, "input", layers), lists_of(plan, "inside", layers), strict=True)
        for place, ((scales, inside), layer) in enumerate(zip(both, layers, strict=True)):
            if type(layer.router_config) is not TokenChoice or layer.expert_bias:
                raise ValueError(
                    f"router {layer.router_config.name!r} of layer {place}: transform "
                    f"{self.name!r} takes token_choice, and experts without biases"
                )
            shape = (layer.num_experts, layer.intermediate_size)
            tensors = torch.tensor(scales), torch.tensor(inside)
            right = tensors[0].shape == (layer.hidden_size,) and tensors[1].shape == shape
            if not right or not all((t > 0).all() for t in tensors) or not 0 < clips[place] <= 1:
                raise ValueError(
                    f"the plan's scales of layer {place} must be {layer.hidden_size} positive "
                    f"numbers, {shape[0]} times {shape[1]} inside experts, and a clip up to 1"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        found = dict(tensors)
        if self.smooth:
            found = self._smoothed(found, plan, place)
        if self.router_bits < WHOLE:
            bits, clip = self.router_bits, plan["clip"][place]
            found["router.weight"] = found["router.weight"].then(
                lambda w: on_grid(*grid_of(w, bits, clip)).to(w.dtype)
            )
        if self.bits == WHOLE:
            return found
        experts = tensors["experts.down_proj"].shape[0]
        each = 3 if "experts.gate_up_proj" in tensors else 2
        return with_bits(found, [self.bits] * each * experts, self.store == "packed")

    def _smoothed(self, found: LayerTensors, plan: Any, place: int) -> LayerTensors:
        """Tensors of a layer and the norm before it that compute the same."""
        scale, inside = (torch.tensor(plan[name][place]) for name in ("input", "inside"))

        def changed(tensor: LazyTensor, factor: Tensor) -> LazyTensor:
            return tensor.then(lambda value: (value.double() * factor).to(value.dtype))

        def reads(name: str) -> bool:
            up = name.endswith(("gate_up_proj", ".up_proj"))
            return name in ("router.weight", "shared_gate.weight") or up

        found["norm.weight"] = changed(found["norm.weight"], 1 / scale.double())
        for name, tensor in found.items():
            if name == "experts.gate_up_proj":
                rows = torch.cat([torch.ones_like(inside), 1 / inside.double()], dim=1)
                found[name] = changed(tensor, scale.double() * rows[:, :, None])
            elif reads(name):
                found[name] = changed(tensor, scale.double())
        name = f"{EXPERTS}down_proj"
        found[name] = changed(found[name], inside.double()[:, None])
        return found

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        if self.store == "plain" or self.bits == WHOLE:
            return layer
        each = 3 if layer.activation in GATED else 2
        bits = text_of([self.bits] * each * layer.num_experts)
        return replace(layer, experts=Packed(bits=bits))


def scale_of(tokens: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """What weights of a channel are multiplied with, and tokens divided by.

    Args:
        tokens, weights: largest absolute values of each channel.
        alpha: share of the tokens' unevenness that goes into weights.
    """
    tokens, weights = tokens.clamp_min(SMALLEST), weights.clamp_min(SMALLEST)
    return tokens**alpha / weights ** (1 - alpha)


def divergence(x: Tensor, weight: Tensor, bits: int, clip: float, top_k: int) -> float:
    """KL of a rounded router from itself, over the experts that it chooses, mean over tokens.

    Args:
        x: tokens, [T, H].
        weight: of the router, [E, H].
        bits, clip: how it is rounded.
        top_k: experts of a token.
    """
    logits = x @ weight.T
    rounded = x @ on_grid(*grid_of(weight, bits, clip)).T
    chosen = logits.topk(top_k, dim=-1).indices
    log_p = logits.log_softmax(-1).gather(-1, chosen)
    log_q = rounded.log_softmax(-1).gather(-1, chosen)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) if len(x) else 0.0


CARD = Card(
    name="eaquant",
    title="EAQuant",
    summary="one scale of channels for router and experts, then few bits for both",
    paper="2506.13329",
    level="model",
    branch="quantization",
    rows=(Row(table=TRANSFORMS, kind=EaQuant),),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Scaling alone changes no choice and outputs by less than 1e-6; with 4 channels of tokens "
        "25 times as large as the others, tokens and weights of 4 bits are off by at most 0.75 of "
        "what they are without it; a router of 3 bits reaches the one of 101 shares of its range "
        "that has the lowest KL, less than all of it (1) where two weights stand out."
    ),
    departs=(
        "Weights are rounded and tokens are not: what rounded tokens would cost, a test computes. "
        "Experts are rounded over their whole range, without rotations. What is inside an expert "
        "that the text does not show is left unscaled. That the router then agrees more often was "
        "not seen."
    ),
)
