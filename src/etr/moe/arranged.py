"""How a layer is arranged: over ranks, and by other options than those it was made with."""

from __future__ import annotations

import dataclasses
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from etr.moe.calibration import Calibration
from etr.moe.config import MoEConfig
from etr.moe.dispatch import DISPATCHERS, Dispatcher, Permute
from etr.moe.expert_parallel import dispatcher_across, shard_experts
from etr.moe.experts import EXPERT_BACKENDS, ExpertBackend, auto_backend
from etr.moe.learner import LayerState
from etr.moe.options import OPTIONS
from etr.moe.parts import LayerParts
from etr.moe.ranks import ExpertParallel
from etr.moe.routers import Router
from etr.moe.routing import Routing, Selection
from etr.moe.serving import serving_of
from etr.moe.state import GlobalState

M = TypeVar("M", bound=nn.Module)

BUILT_IN = (
    *("activation", "swiglu_limit", "swiglu_alpha", "expert_bias"),
    *("experts", "num_shared_experts", "shared_intermediate_size", "shared_gate"),
    "inner_steps",
)
"""Options of which the experts are made, which cannot be changed any more."""
PARTS = (
    *("config", "router", "capacity", "calibration", "state", "dispatcher", "parallel"),
    *("traits", "rank_by", "normalize", "serving", "_losses"),
)
"""What `reconfigure` may exchange."""


class ArrangedParts(LayerParts):
    """Parts of a layer that can be divided among ranks and given other options.

    Args:
        config, layer_index: as in `LayerParts`.
    """

    def __init__(self, config: MoEConfig, layer_index: int) -> None:
        super().__init__(config, layer_index)
        self.dispatcher = _dispatcher(config, None)
        self.parallel: ExpertParallel | None = None
        self.later: nn.ModuleList | tuple[()] = ()

    def distribute(self, parallel: ExpertParallel) -> Self:
        """Keep this rank's experts alone, and work with the other ranks from now on.

        Call it on every rank, with the same values beforehand or on the meta device. Forward and
        backward then run on all ranks together, if only on no tokens. Router and state stay whole
        on every rank; stats and `Routing` speak of this rank's tokens.

        Args:
            parallel: ranks and groups; may be shared by layers.
        Raises:
            ValueError: dispatcher, backend or sizes do not go with these ranks.
        """
        dispatcher = dispatcher_across(self.config, parallel)
        shard_experts(self.bank, parallel)
        self.dispatcher, self.parallel = dispatcher, parallel
        return self

    def reconfigure(self, *, parallel: ExpertParallel | None = None, **options: Any) -> Self:
        """Change options of the layer in place, checked together; one refused leaves all unchanged.

        What was learned stays where it fits: parameters and state of a router or a policy of the
        same kind, by name and shape; thresholds, steps and load where all that the new router has
        came from the old one and its scores are on the same scale. Pending counters of another
        router are dropped. Make the optimizer afterwards: a new router has new parameters.

        Args:
            parallel: the same experts on the same ranks, with other groups or nodes.
            options: fields of `LayerOptions` except those of which the experts are made.
        Raises:
            ValueError: an option is unknown, refused, or built into the experts; or `parallel` puts
                experts elsewhere.
        """
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(
                f"a layer has no option {', '.join(unknown)}; it has {', '.join(OPTIONS)}"
            )
        config = dataclasses.replace(self.config, **options)
        fixed = [name for name in BUILT_IN if getattr(config, name) != getattr(self.config, name)]
        if fixed:
            raise ValueError(
                f"{', '.join(fixed)}: experts are made of it; make a new layer for another value"
            )
        _check_arrangement(self.parallel, parallel)
        parallel = self.parallel if parallel is None else parallel
        dispatcher = _dispatcher(config, parallel)
        if config.router_config != self.router.config:
            self._take_router(config.router_config.build(*_sizes(config)), config)
        if config.capacity_config != self.capacity.config:
            new = config.capacity_config.build(*_sizes(config))
            self.capacity = _successor(new, self.capacity, self._like())
        if "eval_selection" in options:
            self.serving = serving_of(config.eval_selection, "eval_selection")
        self.dispatcher, self.parallel = dispatcher, parallel
        self.take_choices(config)
        return self

    def snapshot(self) -> dict[str, Any]:
        """What `reconfigure` may exchange, with what it has learned, for `restore`."""
        state = [{k: v.clone() for k, v in x.state_dict().items()} for x in self.learners()]
        found = {name: getattr(self, name) for name in PARTS}
        return {**found, "pending": self.pending, "learned": state}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Put back what `snapshot` gave, as it was then."""
        for name in (*PARTS, "pending"):
            setattr(self, name, snapshot[name])
        for learner, state in zip(self.learners(), snapshot["learned"], strict=True):
            learner.load_state_dict(state)

    def backend_for(self, routing: Routing, selection: Selection) -> ExpertBackend:
        """What runs the experts of these pairs."""
        name = self.config.backend
        if name == "auto":
            padded = self.dispatcher.padded
            if not self.dispatcher.needs_ranks:
                padded = self.traits.padded and selection.buffer_size < routing.num_tokens
            own = None if padded else self.bank.backend
            name = own or auto_backend(routing.expert.device.type, padded)
        return EXPERT_BACKENDS[name]

    def _take_router(self, router: Router, config: MoEConfig) -> None:
        old, like = self.router, self._like()
        self.router = _successor(router, old, like)
        self.pending = {}
        edges = (one.score_scale.edges() for one in (router, old))
        fits = type(router) is type(old) and len(_fitting(router, old)) == len(router.state_dict())
        if not fits or not torch.equal(*edges):
            for name, new in (
                ("calibration", Calibration(config.num_choices, router.score_scale)),
                ("state", LayerState(config.num_choices)),
            ):
                setattr(self, name, new.to(like.device).train(self.training))

    def _like(self) -> Tensor:
        """A tensor on the layer's device, in the router's dtype."""
        return next(self.router.parameters(), next(self.parameters(), self.state.previous_load))


def _sizes(config: MoEConfig) -> tuple[int, int, int]:
    return config.hidden_size, config.num_choices, config.top_k


def _dispatcher(config: MoEConfig, parallel: ExpertParallel | None) -> Dispatcher:
    if parallel is not None:
        return dispatcher_across(config, parallel)
    return Permute() if config.dispatch == "auto" else DISPATCHERS.parse(config.dispatch)


def _check_arrangement(old: ExpertParallel | None, new: ExpertParallel | None) -> None:
    if new is None:
        return
    if old is None:
        raise ValueError("parallel: the layer is whole; divide its experts with `distribute`")
    if new.placement.rank_of_expert != old.placement.rank_of_expert or new.mesh != old.mesh:
        raise ValueError("parallel: experts would be on other ranks, and they do not move")


def _fitting(new: nn.Module, old: nn.Module) -> dict[str, Tensor]:
    """Parameters and state of `old` that `new` has too."""
    own = new.state_dict()
    return {k: v for k, v in old.state_dict().items() if k in own and own[k].shape == v.shape}


@torch.no_grad()
def _successor(new: M, old: nn.Module, like: Tensor) -> M:
    """`new` in the place of `old`: where and how it is, with what it learned as far as it fits."""
    new.to(device=like.device, dtype=like.dtype)
    if type(new) is type(old):
        state = new.state_dict()
        for name, value in _fitting(new, old).items():
            state[name].copy_(value)
    for module in new.modules():
        if isinstance(module, GlobalState):
            module.state_changed()
    return new.train(old.training)
