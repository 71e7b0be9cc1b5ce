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

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from etr.moe.affinity import without_autocast
from etr.moe.arranged import ArrangedParts
from etr.moe.collector import Collector, Pool
from etr.moe.config import MoEConfig
from etr.moe.context import RoutingContext
from etr.moe.exchange import Traffic
from etr.moe.experts import ExpertParams, run_shared
from etr.moe.inner_steps import in_steps
from etr.moe.inputs import check_finite, check_input, leave_logits, local_bonus, router_input
from etr.moe.keep import Order, keep
from etr.moe.learner import Seen
from etr.moe.losses import Loss, LossInput, scaled_losses
from etr.moe.routing import Kept, Limit, MoEOutput, Routing, Selection
from etr.moe.select import run_ranks
from etr.moe.stats import Counters, routing_stats
from etr.moe.view import Watcher, show


class MoE(ArrangedParts):
    """Mixture-of-Experts feed-forward layer.

    A forward changes no state: counters wait in `pending` until `after_step`. Further inner steps
    are layers themselves, in `later`, which hold the same experts.

    Args:
        config: every choice about the layer.
        layer_index: as in `Collected`; part of the seed of `hash` and
            `random`, and the key of replayed choices.
    """

    def __init__(self, config: MoEConfig, layer_index: int = 0) -> None:
        super().__init__(config, layer_index)
        self.watchers: list[Watcher] = []
        self.output_watchers: list[Watcher] = []
        if config.inner_steps > 1:
            one = replace(config, inner_steps=1)
            steps = [MoE(one, self.layer_index + n) for n in range(1, config.inner_steps)]
            for step in steps:
                step.take_experts(self)
                step.place = layer_index
            self.later = nn.ModuleList(steps)

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
        context = RoutingContext.of(context)
        if not self.later:
            return self.walk(hidden_states, context)
        rows = self.loss_rows()
        steps = [partial(step.walk, context=context, rows=rows) for step in (self, *self.later)]
        return in_steps(steps, hidden_states)

    def walk(
        self, hidden_states: Tensor, context: RoutingContext, rows: tuple[Loss, ...] | None = None
    ) -> MoEOutput:
        """One inner step of `forward`; its losses are `rows`, or the layer's own."""
        traffic = None
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
        show(self.watchers, self, x, routing, kept.selection, task=context.task)
        y = self.run_experts(x, routing, kept.selection, traffic)
        show(self.output_watchers, self, x, routing, kept.selection, y, task=context.task)
        rows = self.loss_rows() if rows is None else rows
        losses = self.losses(x, routing, kept, context, collector, rows) if learns else {}

        def count() -> dict[str, Tensor]:
            stats = self.stats(routing, kept, learns=learns, x=x)
            stats |= {f"loss_{name}": loss.detach() for name, loss in losses.items()}
            return stats if traffic is None else traffic.add_to(stats)

        output = MoEOutput(
            hidden_states=y.to(hidden_states.dtype).view_as(hidden_states),
            losses=losses,
            stats=count() if learns else Counters(count),
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
            place=self.place,
            bonus=local_bonus(x, context, bonus, self.num_choices) if learns else None,
            learns=learns,
        )
        if learns:
            routing, limit = self.router(x, inputs), None
        else:
            serving = self.serving_for(context)
            routing, limit = serving.route(self.router, x, inputs, self.calibration)
        if self.traits.reads_before:
            leave_logits(routing.logits, context, self.layer_index)
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
            num_weighed=self.num_weighed,
            scale=self.config.routed_scale,
        )
        gather = learns and any(learner.observes_choosers for learner in self.learners())
        return keep(routing, limit, self.capacity, self.calibration, order, traffic, gather=gather)

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
        with without_autocast(x):

            def dispatch(
                x: Tensor, routing: Routing, selection: Selection, params: ExpertParams
            ) -> Tensor:
                backend = self.backend_for(routing, selection)
                return self.dispatcher.run(x, routing, selection, backend, params, traffic)

            def run(x: Tensor, *params: ExpertParams) -> Tensor:
                return self.bank.run(x, routing, selection, params, dispatch)

            y = self.experts(x, x.dtype, run)
            if self.shared_experts is not None:
                counts = selection.num_tokens_per_expert
                y = y + run_shared(x, self.shared_experts, self.shared_gate, counts)
        return y

    def losses(
        self,
        x: Tensor,
        routing: Routing,
        kept: Kept,
        context: RoutingContext,
        collector: Collector | None,
        rows: tuple[Loss, ...],
    ) -> dict[str, Tensor]:
        """Scaled losses of one forward; those with weight 0 are left out."""
        given = LossInput(
            routing=routing,
            selection=kept.selection,
            context=context,
            choices=kept.num_choices_per_expert,
            meant=self.meant,
            past=self.state.previous_load,
            earlier=None if collector is None else collector.earlier_choices(self),
            router=self.router,
            step=self.state.step,
            layer_index=self.layer_index,
            pool=Pool if collector is None else partial(collector.pool, self),
            x=x,
            expert_group=None if self.parallel is None else self.parallel.expert_peers.group,
        )
        experts = self._modules.get("experts")  # those of another engine are not here
        found = scaled_losses(rows, given, self.traits, experts)
        if experts is not None:
            found |= self.bank.losses(x, routing, kept.selection, context)
        return found

    @torch.no_grad()
    def stats(
        self, routing: Routing, kept: Kept, *, learns: bool | None = None, x: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Counters of one forward; where it learns (None: in training), also for `after_step`.

        Of tokens x, float [T, H], learners may ask for what the experts make.
        """
        found = routing_stats(routing, kept)
        if x is not None:
            found |= self.bank.counters(x, routing, kept.selection)
        if self.training if learns is None else learns:
            sums = None if x is None else partial(self.output_sums, x, routing, kept.selection)
            seen = Seen(routing=routing, kept=kept, output_sums=sums)
            for learner in self.learners():
                found |= learner.observe(seen)
        return found
