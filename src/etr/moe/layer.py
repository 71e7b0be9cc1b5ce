"""The Mixture-of-Experts layer: one value walks one way.

x [T, H]
  router       what each token wants          Routing
  keep         what each expert keeps         Kept, in it a Selection
  dispatch     rows travel to their expert
  experts      grouped feed-forward
  combine      weighted sum in token order    y [T, H]
beside it: losses and statistics, pure functions of Routing and Selection
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etr.moe.calibration import Calibration
from etr.moe.collector import Collected, Collector
from etr.moe.config import MoEConfig
from etr.moe.context import RoutingContext
from etr.moe.dispatch import DISPATCHERS, Permute
from etr.moe.exchange import Traffic
from etr.moe.expert_parallel import dispatcher_across, shard_experts
from etr.moe.experts import (
    EXPERT_BACKENDS,
    Bank,
    Clamp,
    ExpertBackend,
    ExpertParams,
    ExpertSizes,
    ExpertWeights,
    SharedGate,
    auto_backend,
    run_shared,
)
from etr.moe.inputs import check_finite, check_input, local_bonus, router_input
from etr.moe.keep import Order, keep
from etr.moe.learner import LayerState, Learner, Seen, learners_in
from etr.moe.losses import Loss, LossInput, scaled_losses
from etr.moe.notice import warn
from etr.moe.ranks import ExpertParallel
from etr.moe.routers import Router
from etr.moe.routing import Kept, Limit, MoEOutput, Routing, Selection
from etr.moe.select import run_ranks
from etr.moe.serving import LayerFacts, Serving, serving_of
from etr.moe.serving.dropless import Dropless
from etr.moe.state import keep_state
from etr.moe.stats import routing_stats, target_kept
from etr.moe.view import LayerView, Watcher


class MoE(Collected):
    """Mixture-of-Experts feed-forward layer.

    A forward changes no state: counters wait in `pending` until `after_step`.

    Args:
        config: every choice about the layer.
        layer_index: as in `Collected`; part of the seed of `hash` and
            `random`, and the key of replayed choices.
    """

    def __init__(self, config: MoEConfig, layer_index: int = 0) -> None:
        super().__init__(layer_index)
        if not isinstance(config, MoEConfig):
            raise TypeError(f"config is {type(config).__name__}; it must be a MoEConfig")
        self.config = config
        size = (config.hidden_size, config.num_choices, config.top_k)
        self.router = config.router_config.build(*size)
        self.capacity = config.capacity_config.build(*size)
        self.calibration = Calibration(config.num_choices, self.router.score_scale)
        self.state = LayerState(config.num_choices)
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
                1,
                config.hidden_size,
                config.shared_width,
                config.activation,
                clamp=clamp,
            )
        if config.shared_gate:
            self.shared_gate = SharedGate(config.hidden_size, 1, bias=False)
        auto = config.dispatch == "auto"
        self.dispatcher = Permute() if auto else DISPATCHERS.parse(config.dispatch)
        self.parallel: ExpertParallel | None = None
        self.traits = config.router_config.traits
        self._losses = config.loss_rows
        self.rank_by = config.resolved_rank_by
        self.normalize = config.resolved_normalize
        self.serving = serving_of(config.eval_selection, "eval_selection")
        self.watchers: list[Watcher] = []
        self.output_watchers: list[Watcher] = []
        self.register_load_state_dict_pre_hook(keep_state)

    def distribute(self, parallel: ExpertParallel) -> MoE:
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

    def forward(self, hidden_states: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """Route, run the experts, combine.

        Args:
            hidden_states: float [..., H].
            context: mask, token ids, placement and so on; see `RoutingContext`.
        Returns:
            MoEOutput; the routed part is exactly zero for a token with no kept pair.
        Raises:
            TypeError: not a tensor, or not a context.
            ValueError: wrong dtype, width or mask shape; with `debug`, NaN or infinite values, on
                every rank if they are on any.
        """
        context, traffic = RoutingContext.of(context), None
        if self.parallel is not None:
            checked = f"MoE layer {self.layer_index}" if self.config.debug else None
            context, traffic = self.parallel.fill(context), Traffic(self.parallel, checked)
        check_input(hidden_states, context, self.config.hidden_size)
        if self.config.debug:
            check_finite(hidden_states, context, self.layer_index, ranks=self.parallel is not None)
        x = hidden_states.reshape(-1, self.config.hidden_size)
        if context.valid_mask is not None:
            # Whatever padding holds, even NaN, must not reach a sum in the backward pass.
            x = x.masked_fill(~context.valid_mask.reshape(-1, 1), 0.0)
        collector = context.collector or self.collector
        self.note_training(collector)

        routing, limit = self.route(x, context, traffic)
        learns = self.learns_from(context)
        kept = self.keep(routing, limit, traffic, learns=learns)
        self.show(self.watchers, x, routing, kept.selection)
        y = self.run_experts(x, routing, kept.selection, traffic)
        self.show(self.output_watchers, x, routing, kept.selection, y)
        losses = self.losses(x, routing, kept, context, collector) if learns else {}
        stats = self.stats(routing, kept, learns=learns)
        stats |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        output = MoEOutput(
            hidden_states=y.to(hidden_states.dtype).view_as(hidden_states),
            losses=losses,
            stats=stats if traffic is None else traffic.add_to(stats),
        )
        if collector is not None:
            collector.add(self, output, learns=learns)
        return output

    def route(
        self, x: Tensor, context: RoutingContext, traffic: Traffic | None = None
    ) -> tuple[Routing, Limit | None]:
        """What tokens want, and what experts may keep of it if not what the capacity policy says.

        In training that is for the policy to say, else for the serving policy.

        Args:
            x: tokens, float [T, H].
            context: as in `forward`.
            traffic: the ranks whose tokens compete; None for this rank's alone.
        """
        learns, bonus = self.learns_from(context), self.config.local_bonus
        inputs = router_input(
            x,
            context,
            traffic,
            position_free=self.traits.position_free,
            step=self.state.step,
            layer_index=self.layer_index,
            bonus=local_bonus(x, context, bonus, self.config.num_choices) if learns else None,
        )
        if learns:
            routing, limit = self.router(x, inputs), None
        else:
            serving = self._serving_for(context)
            routing, limit = serving.route(self.router, x, inputs, self.calibration)
        return routing if context.ranks is None else run_ranks(routing, context.ranks), limit

    def keep(
        self,
        routing: Routing,
        limit: Limit | None = None,
        traffic: Traffic | None = None,
        *,
        learns: bool | None = None,
    ) -> Kept:
        """What experts keep of what `route` found.

        Args:
            learns: whether counters for `after_step` will be asked for; None: in training.
        """
        learns = self.training if learns is None else learns
        order = Order(
            rank_by=self.rank_by,
            pool=self.traits.expert_pool,
            normalize=self.normalize,
            num_weighed=self.config.bank_config.num_weighed(self.config.num_experts),
            scale=self.config.routed_scale,
        )
        gather = learns and any(learner.observes_choosers for learner in self.learners())
        return keep(routing, limit, self.capacity, self.calibration, order, traffic, gather=gather)

    def show(
        self,
        watchers: list[Watcher],
        x: Tensor,
        routing: Routing,
        selection: Selection,
        output: Tensor | None = None,
    ) -> None:
        """Call watchers with what the layer did."""
        for watcher in watchers:
            y = None if output is None else output.detach()
            view = LayerView(
                layer=self, x=x.detach(), routing=routing, selection=selection, output=y
            )
            watcher(view)

    def run_experts(
        self, x: Tensor, routing: Routing, selection: Selection, traffic: Traffic | None = None
    ) -> Tensor:
        """Dispatch, experts and combine, and the shared experts, [T, H].

        Under autocast the experts run in its dtype, except for float64 inputs; otherwise in that
        of `x`.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device_type=device, enabled=False):

            def dispatch(
                x: Tensor, routing: Routing, selection: Selection, params: ExpertParams
            ) -> Tensor:
                backend = self._backend(routing, selection)
                return self.dispatcher.run(x, routing, selection, backend, params, traffic)

            def run(x: Tensor, *params: ExpertParams) -> Tensor:
                return self.bank.run(x, routing, selection, params, dispatch)

            y = self.experts(x, x.dtype, run)
            if self.shared_experts is not None:
                counts = selection.num_tokens_per_expert
                y = y + run_shared(x, self.shared_experts, self.shared_gate, counts)
        return y

    @property
    def bank(self) -> Bank:
        """The experts, also where an adapter wraps them."""
        found = self.experts
        if not isinstance(found, Bank):
            found = next(module for module in found.modules() if isinstance(module, Bank))
        return found

    def learns_from(self, context: RoutingContext) -> bool:
        """Whether a call trains: the training policy selects, and losses and counters are taken."""
        return self.training and context.serving is None

    def loss_rows(self) -> tuple[Loss, ...]:
        """The losses, whatever their weights."""
        return self._losses

    def losses(
        self,
        x: Tensor,
        routing: Routing,
        kept: Kept,
        context: RoutingContext,
        collector: Collector | None,
    ) -> dict[str, Tensor]:
        """Scaled losses of one forward; those with weight 0 are left out."""
        given = LossInput(
            routing=routing,
            selection=kept.selection,
            context=context,
            choices=kept.num_choices_per_expert,
            past=self.state.previous_load,
            earlier=None if collector is None else collector.earlier_choices(self),
            router=self.router,
            x=x,
            expert_group=None if self.parallel is None else self.parallel.expert_peers.group,
        )
        experts = self._modules.get("experts")  # those of another engine are not here
        return scaled_losses(self.loss_rows(), given, self.traits, experts)

    @torch.no_grad()
    def stats(
        self, routing: Routing, kept: Kept, *, learns: bool | None = None
    ) -> dict[str, Tensor]:
        """Counters of one forward; where it learns (None: in training), also for `after_step`."""
        found = routing_stats(routing, kept)
        if self.training if learns is None else learns:
            seen = Seen(routing=routing, kept=kept)
            for learner in self.learners():
                found |= learner.observe(seen)
        return found

    def learners(self) -> list[Learner]:
        """Whoever learns once per optimizer step, in the order in which they do."""
        return [self.calibration, self.capacity, *learners_in(self.router), self.state]

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
            or any(learner.moves for learner in (self.capacity, *learners_in(self.router)))
        )

    @torch.no_grad()
    def calibrate_from_pending(self, decay: float | None = None) -> None:
        """Consume the pending counters for the thresholds alone: no step, no schedule moves."""
        stats, self.pending = self.pending, {}
        self.unlearned.learned()
        if "score_histogram" in stats:
            self.calibration.update(stats["score_histogram"], target_kept(stats), decay)

    def train(self, mode: bool = True) -> MoE:
        super().train(mode)
        if not mode:
            self.warn_about_eval()
        return self

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"num_experts={config.num_experts}, top_k={config.top_k}, "
            f"router={config.router_config.name}, capacity={config.capacity_config.name}, "
            f"rank_by={self.rank_by}"
        )

    def _backend(self, routing: Routing, selection: Selection) -> ExpertBackend:
        name = self.config.backend
        if name == "auto":
            padded = self.dispatcher.padded
            if not self.dispatcher.needs_ranks:
                padded = self.traits.padded and selection.buffer_size < routing.num_tokens
            name = auto_backend(routing.expert.device.type, padded)
        return EXPERT_BACKENDS[name]

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

    def _serving_for(self, context: RoutingContext) -> Serving:
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
