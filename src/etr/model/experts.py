"""What transforms of experts have in common: which were seen, which stay, tensors made together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from etr.model.transform import LayerTensors, LazyTensor, Transform, holds_experts
from etr.moe.config import MoEConfig
from etr.moe.experts.uniform import Uniform

EXPERTS = "experts."
"""Beginning of the names of the routed experts' tensors."""
Values = dict[str, Tensor]
"""Tensors of a layer's routed experts, by their names in the bank."""


@dataclass(frozen=True, kw_only=True)
class OfExperts(Transform):
    """A transform of equal experts, some of which it may have to leave as they are."""

    protect: str = ""
    """Experts that stay as they are, as layer.expert joined by +, both from 0: 0.3+1.7. What
    super_experts finds is written so."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+\.\d+(\+\d+\.\d+)*)?", self.protect):
            raise ValueError(
                f"protect={self.protect!r} must be experts as layer.expert joined by +, such as "
                "0.3+1.7"
            )

    def protected(self, layers: Sequence[MoEConfig]) -> list[set[int]]:
        """Of each layer, the experts that stay as they are.

        Raises:
            ValueError: there is no such expert.
        """
        found: list[set[int]] = [set() for _ in layers]
        for text in filter(None, self.protect.split("+")):
            layer, expert = map(int, text.split("."))
            if layer >= len(layers) or expert >= layers[layer].num_experts:
                raise ValueError(
                    f"protect={self.protect!r} names expert {expert} of layer {layer}; there are "
                    f"{len(layers)} layers of {[each.num_experts for each in layers]} experts"
                )
            found[layer].add(expert)
        return found

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        self.protected(layers)
        for layer in layers:
            if not isinstance(layer.bank_config, Uniform):
                raise ValueError(
                    f"experts={layer.bank_config.name!r}: transform {self.name!r} takes uniform "
                    "experts"
                )


@dataclass(frozen=True, kw_only=True)
class Calibrated(OfExperts):
    """A transform that judges experts by what they did on text."""

    min_tokens: int = 1
    """Kept tokens of the text below which an expert counts as unseen."""
    unseen: Literal["keep", "drop", "refuse"] = "keep"
    """What becomes of an expert that the text did not show. keep: it stays as it is. drop: it goes
    first. refuse: there is no plan."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens} must be at least 0 tokens")
        if self.unseen not in ("keep", "drop", "refuse"):
            raise ValueError(f"unseen={self.unseen!r} must be one of keep, drop, refuse")

    def judged(
        self, tokens: Sequence[Tensor], scores: Sequence[Tensor], layers: Sequence[MoEConfig]
    ) -> list[Tensor]:
        """Scores in which infinity says that an expert stays, and minus infinity that it goes.

        Args:
            tokens: kept ones of each expert, [E] for each layer.
            scores: of what is to be kept, [E] or [E, N].
            layers: their configs.
        Raises:
            ValueError: an expert was not seen, where that is to be refused.
        """
        found = []
        for place, protected in enumerate(self.protected(layers)):
            score = scores[place].double().clone()
            unseen = {e for e, n in enumerate(tokens[place].tolist()) if n < self.min_tokens}
            if unseen and self.unseen == "refuse":
                raise ValueError(
                    f"unseen='refuse': experts {sorted(unseen)} of layer {place} kept fewer than "
                    f"min_tokens={self.min_tokens} tokens of the text; give more of it"
                )
            if self.unseen == "drop":
                score[sorted(unseen)] = -torch.inf
            score[sorted(protected | (unseen if self.unseen == "keep" else set()))] = torch.inf
            found.append(score)
        return found


def matrices_of(values: Values) -> Values:
    """Matrices [E, O, I] by name: gate (where there is one), up and down."""
    if "gate_up_proj" in values:
        gate, up = values["gate_up_proj"].chunk(2, dim=1)
        return {"gate": gate, "up": up, "down": values["down_proj"]}
    return {"up": values["up_proj"], "down": values["down_proj"]}


def best(scores: Tensor, count: int) -> Tensor:
    """Which of scores are among the `count` highest, the first of equal ones: bool, their shape."""
    order = scores.flatten().argsort(descending=True, stable=True)
    found = torch.zeros(scores.numel(), dtype=torch.bool)
    found[order[:count]] = True
    return found.view(scores.shape)


def taken(
    tensors: LayerTensors, experts: Sequence[int], num_experts: int, but: Iterable[str] = ()
) -> LayerTensors:
    """A layer of some of its experts, in any order and any number of times.

    Args:
        tensors: of the layer.
        experts: old number of each new one.
        num_experts: how many there were.
        but: names of tensors that stay.
    """
    index = list(experts)
    return {
        name: tensor.then(lambda value: value[index], shape=(len(index), *tensor.shape[1:]))
        if holds_experts(name, tensor.shape, num_experts) and name not in but
        else tensor
        for name, tensor in tensors.items()
    }


def shared_width(layer: MoEConfig) -> int | None:
    """Width of each shared expert, said outright, so that the routed ones may get another."""
    if layer.num_shared_experts and layer.shared_intermediate_size is None:
        return layer.intermediate_size
    return layer.shared_intermediate_size


def check_numbers(found: Any, limit: int, what: str) -> None:
    """Refuse what is not a list of different whole numbers from 0 to `limit` - 1.

    Raises:
        ValueError: says what it is.
    """
    whole = isinstance(found, list) and all(type(x) is int and 0 <= x < limit for x in found)
    if not whole or len(set(found)) < len(found):
        raise ValueError(f"the plan's {what} must be different numbers below {limit}: {found!r}")


def lists_of(plan: Any, name: str, layers: Sequence[MoEConfig]) -> list[Any]:
    """What a plan says of each layer under a name.

    Raises:
        ValueError: it does not, or of other layers.
    """
    found = plan.get(name) if isinstance(plan, dict) else None
    if not isinstance(found, list) or len(found) != len(layers):
        count = f"of {len(found)} layers" if isinstance(found, list) else "missing"
        raise ValueError(
            f"the plan's {name!r} is {count}, and the model has {len(layers)} MoE layers"
        )
    return found


def rebuilt(
    tensors: LayerTensors,
    change: Callable[[Values], Mapping[str, Tensor]],
    like: Callable[[Values], Mapping[str, Tensor]] | None = None,
) -> LayerTensors:
    """A layer whose routed experts are made of the old ones, all tensors at once.

    Args:
        tensors: of the layer.
        change: old values of the experts to new ones, by names in the bank.
        like: the same for shapes and dtypes alone, on the meta device; `change` by default.
    """
    old = {k.removeprefix(EXPERTS): t for k, t in tensors.items() if k.startswith(EXPERTS)}
    empty = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in old.items()}
    held: Values = {}

    def take(name: str) -> Tensor:
        if name not in held:
            held.update(change({key: tensor.make() for key, tensor in old.items()}))
        return held.pop(name)

    made = {
        EXPERTS + key: LazyTensor(
            name=EXPERTS + key, shape=tuple(v.shape), dtype=v.dtype, make=partial(take, key)
        )
        for key, v in (like or change)(empty).items()
    }
    return {**{k: t for k, t in tensors.items() if not k.startswith(EXPERTS)}, **made}
