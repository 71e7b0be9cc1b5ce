"""What a layer is made of, and what is asked of it beside its walk: to learn, to serve, to show."""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from etr.moe.affinity import without_autocast
from etr.moe.calibration import Calibration
from etr.moe.collector import Collected, Collector
from etr.moe.config import MoEConfig
from etr.moe.context import RoutingContext
from etr.moe.experts import Bank, Clamp, ExpertParams, ExpertSizes, ExpertWeights, SharedGate
from etr.moe.learner import LayerState, Learner, learners_in
from etr.moe.losses import Loss
from etr.moe.notice import warn
from etr.moe.routers import Router
from etr.moe.routing import Routing, Selection
from etr.moe.serving import LayerFacts, Serving, serving_of
from etr.moe.serving.dropless import Dropless
from etr.moe.state import keep_state
from etr.moe.stats import target_kept


class LayerParts(Collected):
    """Modules and choices of a layer; `MoE` adds the walk through them.

    Args:
        config: every choice about the layer.
        layer_index: number of this layer in its model, inner steps not counted; the layer's own
            `layer_index` counts them.
    """

    def __init__(self, config: MoEConfig, layer_index: int) -> None:
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config is {type(config).__name__}; it must be a MoEConfig")
        super().__init__(layer_index * config.inner_steps)
        self.place = layer_index
        self.take_choices(config)
        size = (config.hidden_size, config.num_choices, config.top_k)
        self.router = config.router_config.build(*size)
        self.capacity = config.capacity_config.build(*size)
        self.calibration = Calibration(config.num_choices, self.router.score_scale)
        self.state = LayerState(config.num_choices)
        self.add_experts()
        self.serving = serving_of(config.eval_selection, "eval_selection")
        weights = frozenset(
            name
            for module in self.modules()
            if isinstance(module, Bank | ExpertWeights)
            for name in (*module._parameters, *module._buffers)
        )
        self.register_load_state_dict_pre_hook(partial(keep_state, weights=weights))

    def take_choices(self, config: MoEConfig) -> None:
        """Follow a config in all that has neither parameters nor state."""
        self.config = config
        self.traits = config.router_config.traits
        self.rank_by = config.resolved_rank_by
        self.normalize = config.resolved_normalize
        self._losses = config.loss_rows
        # A forward reads no option that is text: it would parse it anew, which does not compile.
        self.num_choices = config.num_choices
        self.meant = config.bank_config.meant(config.num_experts)
        self.num_weighed = config.bank_config.num_weighed(config.num_experts)

    def add_experts(self) -> None:
        """Make the bank and, beside it, the shared experts."""
        config = self.config
        clamp = Clamp(config.swiglu_limit, config.swiglu_alpha)
        self.experts = config.bank_config.build(
            ExpertSizes(
                num_experts=config.num_experts,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                activation=config.activation,
                bias=config.expert_bias,
                clamp=clamp,
            )
        )
        self.shared_experts: ExpertWeights | None = None
        self.shared_gate: nn.Linear | None = None
        if config.num_shared_experts:
            # Side by side, shared experts are one expert of their summed width.
            self.shared_experts = ExpertWeights(
                1, config.hidden_size, config.shared_width, config.activation, clamp=clamp
            )
        if config.shared_gate:
            self.shared_gate = SharedGate(config.hidden_size, 1, bias=False)

    def take_experts(self, other: LayerParts) -> None:
        """Hold the experts of another layer from now on, and those beside its bank."""
        self.experts, self.shared_experts = other.experts, other.shared_experts
        self.shared_gate = other.shared_gate

    @property
    def bank(self) -> Bank:
        """The experts, also where an adapter wraps them."""
        found = self.experts
        if not isinstance(found, Bank):
            found = next(module for module in found.modules() if isinstance(module, Bank))
        return found

    def loss_rows(self) -> tuple[Loss, ...]:
        """The losses, whatever their weights."""
        return self._losses

    def learners(self) -> list[Learner]:
        """Whoever learns once per optimizer step, in the order in which they do."""
        others = (*learners_in(self.router), *learners_in(self._modules.get("experts")))
        return [self.calibration, self.capacity, *others, self.state]

    @torch.no_grad()
    def output_sums(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor:
        """Sums of each expert's output over its tokens, without weights, [E, H]; on one rank."""

        def run(x: Tensor, *params: ExpertParams) -> Tensor:
            return self.bank.output_sums(x, routing, selection, params)

        with without_autocast(x):
            sums: Tensor = self.experts(x, torch.promote_types(x.dtype, torch.float32), run)
        return sums

    def note_training(self, collector: Collector | None) -> None:
        """Notice a forward that a backward pass may follow; see `etr.moe.unlearned`."""
        training = self.training and self.attachment is None and torch.is_grad_enabled()
        if training and not torch.compiler.is_compiling() and self.learns_from_steps():
            others = () if collector is None else collector.layers
            self.unlearned.forward(self, [layer.unlearned for layer in others])

    def learns_from_steps(self) -> bool:
        """Whether the layer has anything that changes once per optimizer step."""
        config = self.config
        return (
            not self.traits.position_free  # draws anew in each step
            # thresholds
            or (self.facts(wait=False).ranks_by_score and config.capacity_config.name != "none")
            or any(row.needs_past and row.weight_for(self.traits) for row in self.loss_rows())
            or any(learner.moves for learner in self.learners()[1:-1])
        )

    @torch.no_grad()
    def calibrate_from(self, stats: dict[str, Tensor], decay: float | None = None) -> None:
        """Learn thresholds alone from counters: no step, no schedule moves."""
        self.unlearned.learned()
        if "score_histogram" in stats:
            self.calibration.update(stats["score_histogram"], target_kept(stats), decay)

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"num_experts={config.num_experts}, top_k={config.top_k}, "
            f"router={config.router_config.name}, capacity={config.capacity_config.name}, "
            f"rank_by={self.rank_by}"
        )

    @property
    def eval_selection(self) -> str:
        """The serving policy as text. Setting it sets `serving`."""
        return self.serving.text

    @eval_selection.setter
    def eval_selection(self, text: str | Serving) -> None:
        self.serving = serving_of(text, "eval_selection")

    def has_thresholds(self) -> bool:
        """Whether eval mode can select by calibrated thresholds. Waits for the device."""
        facts = self.facts()
        return facts.ranks_by_score and bool(facts.calibrated)

    def facts(self, *, wait: bool = True) -> LayerFacts:
        """What a serving policy may ask of the layer.

        Args:
            wait: also whether thresholds were learned, for which the host waits for the device.
        """
        known = self.calibration.is_calibrated if wait else None
        return LayerFacts(traits=self.traits, rank_by=self.rank_by, calibrated=known)

    def serving_for(self, context: RoutingContext) -> Serving:
        """The policy that routes a call: the call's or the layer's, or dropless if that refuses."""
        serving = self.serving
        if context.serving is not None:
            serving = serving_of(context.serving, "context.serving")
        return serving if serving.refuses(self.facts(wait=False)) is None else Dropless()

    def warn_about_eval(self) -> None:
        """Say in warnings what makes selection in eval mode another one than it looks."""
        for module in self.router.modules():
            for text in module.report() if isinstance(module, Router) else ():
                warn(text)
        if self.config.capacity_config.name != "none":
            reason = self.serving.refuses(self.facts())
            if reason is not None:
                warn(f"MoE layer evaluates dropless: {reason}")

    def learns_from(self, context: RoutingContext) -> bool:
        """Whether a call trains: the training policy selects, and losses and counters are taken."""
        return self.training and context.serving is None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if not mode:
            self.warn_about_eval()
        return self
