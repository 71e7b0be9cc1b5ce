"""Catching what the routers of a model decide while it runs.

Works with any model that has layers of this library, and with plain transformers models of the
families in `etr.hf.FAMILIES`, whose routers drop nothing: there, every choice is kept, and the
affinities are router logits.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from etr.hf import FAMILIES, family_of
from etr.moe import Routing, Selection, moe_layers
from etr.moe.watch import LayerView, watch
from etr.trace.schema import LayerRouting


@dataclass(frozen=True, kw_only=True)
class LayerChoices:
    """Choices of one layer's T tokens in one forward: P pairs in use, token after token."""

    num_tokens: int
    """Number of tokens T, padding included."""
    token: Tensor
    """Token, int64 [P]."""
    expert: Tensor
    """Expert, int64 [P]."""
    weight: Tensor
    """Weight, float [P]; 0 where dropped."""
    affinity: Tensor | None
    """Affinity, float [P], or None."""
    kept: Tensor
    """Kept, bool [P]."""

    @classmethod
    def of_layer(cls, routing: Routing, selection: Selection) -> LayerChoices:
        """What a layer of this library decided; where experts choose, what they took."""
        used = routing.valid if routing.tokens_choose else selection.kept
        return cls(
            num_tokens=routing.num_tokens,
            token=routing.token[used],
            expert=routing.expert[used],
            weight=selection.combine_weight[used].detach(),
            affinity=None if routing.score is None else routing.score[used],
            kept=selection.kept[used],
        )

    @classmethod
    def of_router(cls, logits: Tensor, weights: Tensor, experts: Tensor) -> LayerChoices:
        """What a transformers router returned: logits [T, E], weights and experts [T, k]."""
        num_tokens, k = experts.shape
        return cls(
            num_tokens=num_tokens,
            token=torch.arange(num_tokens, device=experts.device).repeat_interleave(k),
            expert=experts.flatten(),
            weight=weights.detach().flatten(),
            affinity=logits.detach().gather(1, experts).flatten(),
            kept=torch.ones_like(experts, dtype=torch.bool).flatten(),
        )

    def of_tokens(self, mask: Tensor) -> LayerRouting:
        """The part of the tokens where `mask`, bool [T], is True.

        Raises:
            ValueError: the layer saw another number of tokens.
        """
        if self.num_tokens != mask.numel():
            raise ValueError(
                f"a MoE layer routed {self.num_tokens} tokens of {mask.numel()} in the batch; "
                "tracing needs whole batches, without a cache"
            )
        inside = mask[self.token]
        number = mask.cumsum(0) - 1
        counts = torch.bincount(number[self.token[inside]], minlength=int(mask.sum()))

        def array(values: Tensor) -> Any:
            return values[inside].cpu().numpy()

        return LayerRouting(
            counts=counts.cpu().numpy(),
            experts=array(self.expert),
            weights=array(self.weight.float()),
            affinities=None if self.affinity is None else array(self.affinity.float()),
            kept=array(self.kept),
        )


class RoutingRecorder:
    """Catches what the routers of a model decide.

        with RoutingRecorder(model) as recorder:
            model(input_ids=ids, attention_mask=mask)
            layers = recorder.take(mask.bool())

    Args:
        model: with layers of this library, or a transformers model of a known family.
    Raises:
        ValueError: the model has no MoE layer that can be recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = moe_layers(model)
        self._model = model
        self._routers = [] if layers else routers_of(model)
        self._caught: list[list[LayerChoices]] = [[] for _ in layers or self._routers]
        self._stack = ExitStack()

    def __enter__(self) -> RoutingRecorder:
        self._stack.enter_context(watch(self._model, self._see))
        for router, caught in zip(self._routers, self._caught, strict=False):
            handle = router.register_forward_hook(partial(_catch_router, caught))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def take(self, valid_mask: Tensor) -> list[LayerRouting]:
        """The routing of the forward since the last call, one entry a layer.

        Args:
            valid_mask: True = real token, bool [B, S] or [T]; others are left out.
        Raises:
            ValueError: a layer did not run exactly once, or saw other tokens.
        """
        caught = [list(layer) for layer in self._caught]
        for layer in self._caught:
            layer.clear()
        for index, layer in enumerate(caught):
            if len(layer) != 1:
                raise ValueError(
                    f"MoE layer {index} ran {len(layer)} times since the last call; take the "
                    "routing after each forward of the model"
                )
        return [layer[0].of_tokens(valid_mask.flatten()) for layer in caught]

    def _see(self, place: int, view: LayerView) -> None:
        self._caught[place].append(LayerChoices.of_layer(view.routing, view.selection))


def _catch_router(caught: list[LayerChoices], router: nn.Module, args: Any, output: Any) -> None:
    caught.append(LayerChoices.of_router(*output))


def routers_of(model: nn.Module) -> list[nn.Module]:
    """Routers of a transformers model of a known family, layer after layer.

    Raises:
        ValueError: another model, or one without MoE layers.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise ValueError(
            f"model of class {type(model).__name__} has no MoE layer of this library, and is no "
            f"transformers model of a known family ({', '.join(FAMILIES)})"
        )
    family = family_of(config)
    base: Any = getattr(model, "base_model", model)
    routers = [
        getattr(getattr(layer, family.block), family.router_name)
        for layer in base.layers
        if family.is_moe(layer)
    ]
    if not routers:
        raise ValueError(f"every layer of this {family.model_type} model is dense")
    return routers
