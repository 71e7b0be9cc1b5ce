"""Expert Upcycling: more experts by duplicating the most useful ones (2604.19835)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors, LazyTensor
from etr.model.experts import OfExperts, lists_of, taken
from etr.model.transform import Stats
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.layer import MoE
from etr.moe.routers.token_choice import TokenChoice

Utility = Literal["copy", "weight", "product", "gradient"]


@dataclass(frozen=True, kw_only=True)
class ExpertUpcycling(OfExperts):
    """Duplicates experts, whose copies a bias of the router tells apart, to train on.

    A token goes on choosing as many experts; or, with widen, as many times more as there are
    experts, which keeps the function.
    """

    name = "expert_upcycling"
    summary = "duplicate experts, all alike or the most useful ones, to go on training"
    needs = ("weight_gradients",)

    factor: int = 2
    """How many times as many experts."""
    utility: Utility = "copy"
    """Whom to duplicate. copy: all alike. Else the best first, by the norm of the up projection's
    weights, of its gradient, squared, or by the product of both norms."""
    most: int = 3
    """Duplicates of one expert at most, where they go by utility."""
    noise: float = 0.3
    """Standard deviation of what is added to the copies' logits; without it copies are level."""
    widen: bool = False
    """A token chooses factor times as many experts."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"factor={self.factor} must be at least 1")
        if self.utility not in ("copy", "weight", "product", "gradient"):
            raise ValueError(
                f"utility={self.utility!r} must be one of copy, weight, product, gradient"
            )
        if self.most < max(1, self.factor - 1):
            raise ValueError(
                f"most={self.most} duplicates of an expert make no factor={self.factor}; use at "
                f"least {max(1, self.factor - 1)}"
            )
        if not self.noise >= 0:
            raise ValueError(f"noise={self.noise} must be at least 0")

    @property
    def measures(self) -> bool:
        return self.utility != "copy"

    @property
    def inspects(self) -> bool:
        return self.measures

    def changes_function(self) -> str | None:
        if self.factor == 1:
            return None
        if self.noise:
            return f"noise={self.noise} on the logits of copies"
        if self.utility != "copy" or not self.widen:
            return "a token's choices now mean fewer different experts; widen all copies to keep it"
        return None

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        assert isinstance(layer, MoE)
        (part,) = layer.bank.parts
        weight: Tensor = getattr(part, part.up_name)
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        norms = [value.double().flatten(1).norm(dim=1) for value in (weight.detach(), grad)]
        return {"weight": norms[0], "gradient": norms[1]}

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        order = []
        for one, layer in zip(stats, layers, strict=True):
            more = (self.factor - 1) * layer.num_experts
            if self.utility == "copy":
                order.append([e % layer.num_experts for e in range(more)])
            else:
                order.append(greedy(self._utilities(one), more, self.most))
        return {"order": order}

    def _utilities(self, stats: Stats) -> Tensor:
        weight, gradient = stats["weight"], stats["gradient"]
        known = {"weight": weight, "product": weight * gradient, "gradient": gradient.square()}
        return known[self.utility]

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, (order, layer) in enumerate(
            zip(lists_of(plan, "order", layers), layers, strict=True)
        ):
            known = range(layer.num_experts)
            if not isinstance(order, list) or not all(type(e) is int and e in known for e in order):
                raise ValueError(
                    f"the plan's order of layer {place} must be experts below "
                    f"{layer.num_experts}: {order!r}"
                )
            router = layer.router_config
            if type(router) is not TokenChoice or router.num_groups > 1:
                raise ValueError(
                    f"router {router.name!r} of layer {place}: transform {self.name!r} takes "
                    "token_choice without groups"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        order = plan["order"][place]
        if not order:
            return tensors
        (num_experts, *_) = tensors["experts.down_proj"].shape
        found = self._more(tensors, order)
        if self.noise:
            weight, bias = tensors["router.weight"], tensors.get("router.bias")
            found["router.bias"] = LazyTensor(
                name="router.bias",
                shape=(num_experts + len(order),),
                dtype=weight.dtype,
                make=partial(self._bias, bias, num_experts, order, weight.dtype, place),
            )
        return found

    def _more(self, tensors: LayerTensors, order: Sequence[int]) -> LayerTensors:
        (num_experts, *_) = tensors["experts.down_proj"].shape
        return taken(tensors, [*range(num_experts), *order], num_experts)

    def _bias(
        self,
        old: LazyTensor | None,
        num_experts: int,
        order: Sequence[int],
        dtype: torch.dtype,
        place: int,
    ) -> Tensor:
        """The old one, 0 where there is none, and noise on the copies' [E + C]."""
        bias = torch.zeros(num_experts) if old is None else old.make().float()
        generator = torch.Generator().manual_seed(self.seed * 2**20 + place)
        noise = self.noise * torch.randn(len(order), generator=generator)
        return torch.cat([bias, bias[list(order)] + noise]).to(dtype)

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        order = plan["order"][place]
        if not order:
            return layer
        router = layer.router_config
        assert isinstance(router, TokenChoice)
        scale = layer.routed_scale
        if self.widen and router.gate == "sigmoid" and layer.resolved_normalize == "none":
            scale = scale / self.factor  # gates of copies would add up
        return replace(
            layer,
            num_experts=layer.num_experts + len(order),
            top_k=layer.top_k * (self.factor if self.widen else 1),
            router=replace(router, bias=True) if self.noise else router,
            normalize=layer.resolved_normalize,
            routed_scale=scale,
        )

    def moments(
        self,
        tensors: LayerTensors,
        plan: Any,
        place: int,
        state: Literal["copy", "reset"] = "copy",
        scale: float = 1.0,
    ) -> LayerTensors:
        """An optimizer's state of one layer, of the shapes of its weights.

        Args:
            tensors: by the names of the weights.
            plan, place: as in `apply`.
            state: what copies start with: their origin's, or zeros.
            scale: factor on the copies'.
        """
        order = plan["order"][place]
        (num_experts, *_) = tensors["experts.down_proj"].shape
        factor = scale if state == "copy" else 0.0

        def scaled(value: Tensor) -> Tensor:
            return torch.cat([value[:num_experts], value[num_experts:] * factor])

        more = self._more(tensors, order)
        return {
            name: tensor if tensor is tensors[name] else tensor.then(scaled)
            for name, tensor in more.items()
        }


def greedy(utility: Tensor, count: int, most: int) -> list[int]:
    """Experts to duplicate: the best as often as may be, then the next.

    Args:
        utility: of each, [E].
        count: duplicates in all.
        most: of one.
    """
    order = utility.argsort(descending=True, stable=True).tolist()
    return [expert for expert in order for _ in range(most)][:count]


def carry_optimizer(
    method: ExpertUpcycling,
    plan: Any,
    old: tuple[nn.Module, Optimizer],
    new: tuple[nn.Module, Optimizer],
    state: Literal["copy", "reset"] = "copy",
    scale: float = 1.0,
) -> None:
    """Give the optimizer of the larger model what the smaller one's knew, weight by weight.

    Whatever has no counterpart (a router's new bias) starts anew.

    Args:
        method, plan: what made the larger model.
        old, new: model and optimizer.
        state, scale: see `ExpertUpcycling.moments`.
    """
    (old_model, old_optimizer), (new_model, new_optimizer) = old, new
    known = {name: old_optimizer.state[value] for name, value in old_model.named_parameters()}
    prefixes = [f"{n}." if n else "" for n, m in old_model.named_modules() if isinstance(m, MoE)]
    found: dict[str, dict[str, Any]] = {name: dict(values) for name, values in known.items()}
    for place, prefix in enumerate(prefixes):
        inside = [name for name in known if name.startswith(prefix)]
        for key in {key for name in inside for key in known[name]}:
            tensors = {
                name.removeprefix(prefix): LazyTensor(
                    name=name, shape=tuple(value.shape), dtype=value.dtype, make=value.clone
                )
                for name in inside
                if isinstance(value := known[name].get(key), Tensor) and value.ndim
            }
            if "experts.down_proj" in tensors:
                for name, tensor in method.moments(tensors, plan, place, state, scale).items():
                    found[prefix + name][key] = tensor.make()
    for name, value in new_model.named_parameters():
        if found.get(name):
            kept = found[name].items()
            new_optimizer.state[value] = {
                k: v.clone() if isinstance(v, Tensor) else v for k, v in kept
            }


CARD = Card(
    name="expert_upcycling",
    title="Expert Upcycling",
    summary="duplicates experts of a trained model, whose copies a bias tells apart, to train on",
    paper="2604.19835",
    level="model",
    branch="expert design",
    rows=(Row(table=TRANSFORMS, kind=ExpertUpcycling),),
    moves=("loss", "load", "bytes", "memory"),
    claim=(
        "Where tokens choose m = 2 times as many experts of 2 copies each, the output is that of "
        "the source within 1e-6; where they go on choosing 2, exact copies are chosen together and "
        "the output differs by more than 0.1, and noise of 0.3 on the logits parts them."
    ),
    departs=(
        "Noise is on the logits themselves, also of a router without a bias, which gets one; the "
        "released code adds none there. Utilities are of the gradient summed over the text, and "
        "none asks for an optimizer's moments, which a function without a command carries along "
        "(carry_optimizer). That utility gains over copying was not seen."
    ),
)
