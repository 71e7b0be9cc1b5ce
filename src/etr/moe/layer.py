"""The Mixture-of-Experts layer: one value walks one way.

x [T, H]
  router       what each token wants          Routing
  capacity     what each expert may keep      Limit
  select       what each expert keeps         Selection
  dispatch     rows travel to their expert
  experts      grouped feed-forward
  combine      weighted sum in token order    y [T, H]
beside it: losses and statistics, pure functions of Routing and Selection
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from etr.moe import losses as loss_fns
from etr.moe.calibration import Calibration, score_histogram
from etr.moe.collector import Collector
from etr.moe.config import EVAL_SELECTIONS, EvalSelection, MoEConfig
from etr.moe.dispatch import DISPATCHERS
from etr.moe.experts import EXPERT_BACKENDS, ExpertBackend, ExpertWeights, auto_backend
from etr.moe.routing import Limit, MoEOutput, RouterInput, Routing, RoutingContext, Selection
from etr.moe.select import select
from etr.moe.state import GlobalState
from etr.moe.stats import routing_stats


class LayerState(GlobalState):
    """Optimizer steps done, and the load of the last one."""

    step: Tensor
    previous_load: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_state("step", (), 0, torch.int64)
        self.register_state("previous_load", (num_experts,), 0.0)


class MoE(nn.Module):
    """Mixture-of-Experts feed-forward layer.

    A forward changes no state: counters wait in `pending` until `after_step`.

    Args:
        config: every choice about the layer.
        layer_index: number of this MoE layer in its model; part of the seed of `hash` and
            `random`, and the key of replayed choices.
    """

    def __init__(self, config: MoEConfig, layer_index: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_index = layer_index
        size = (config.hidden_size, config.num_experts, config.top_k)
        self.router = config.router_config.build(*size)
        self.capacity = config.capacity_config.build(*size)
        self.calibration = Calibration(config.num_experts, self.router.score_scale)
        self.state = LayerState(config.num_experts)
        self.experts = ExpertWeights(
            config.num_experts, config.hidden_size, config.intermediate_size, config.activation
        )
        self.shared_experts: ExpertWeights | None = None
        if config.num_shared_experts:
            # Side by side, shared experts are one expert of their summed width.
            width = config.num_shared_experts * config.intermediate_size
            self.shared_experts = ExpertWeights(1, config.hidden_size, width, config.activation)
        self.dispatcher = DISPATCHERS[config.dispatch]()
        self.traits = config.router_config.traits
        self.rank_by = config.resolved_rank_by
        self.normalize = config.resolved_normalize
        self.eval_selection: EvalSelection = config.eval_selection
        self.collector: Collector | None = None
        self.pending: dict[str, Tensor] = {}

    def forward(self, hidden_states: Tensor, context: RoutingContext | None = None) -> MoEOutput:
        """Route, run the experts, combine.

        Args:
            hidden_states: float [..., H].
            context: mask, token ids, placement and so on; see `RoutingContext`.
        Returns:
            MoEOutput; the routed part is exactly zero for a token with no kept pair.
        Raises:
            ValueError: wrong dtype, width or mask shape; with `debug`, NaN or infinite values.
        """
        context = context or RoutingContext()
        self._check(hidden_states, context)
        x = hidden_states.reshape(-1, self.config.hidden_size)
        if context.valid_mask is not None:
            # Whatever padding holds, even NaN, must not reach a sum in the backward pass.
            x = x.masked_fill(~context.valid_mask.reshape(-1, 1), 0.0)
        collector = context.collector or self.collector

        routing, limit = self.route(x, context)
        selection = self.select(routing, limit)
        y = self.run_experts(x, routing, selection)
        output = MoEOutput(
            hidden_states=y.to(hidden_states.dtype).view_as(hidden_states),
            losses=self.losses(routing, context, collector) if self.training else {},
            stats=self.stats(routing, selection, limit),
        )
        if collector is not None:
            collector.add(self, output)
        return output

    def route(self, x: Tensor, context: RoutingContext) -> tuple[Routing, Limit]:
        """What tokens want, and what experts may keep of it.

        Args:
            x: tokens, float [T, H].
        """
        inputs = self._router_input(x, context)
        if self.training or self.eval_selection == "batch":
            routing = self.router(x, inputs)
            state = self.calibration
            return routing, self.capacity.limit(routing, state.threshold, state.affinity_p99)
        if self.eval_selection == "threshold" and self.has_thresholds():
            return self.router(x, inputs), Limit(min_score=self.calibration.threshold)
        return self.router(x, inputs, tokens_choose=True), Limit()

    def select(self, routing: Routing, limit: Limit) -> Selection:
        """What experts keep."""
        return select(
            routing,
            limit,
            rank_by=self.rank_by,
            normalize=self.normalize,
            expert_pool=getattr(self.router.config, "expert_pool", "choosers"),
        )

    def run_experts(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor:
        """Dispatch, experts and combine, and the shared experts, [T, H].

        Under autocast the experts run in its dtype, except for float64 inputs; otherwise in that
        of `x`.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device_type=device, enabled=False):
            backend = self._backend(routing, selection)
            params = self.experts.params(x.dtype)
            y = self.dispatcher.run(x, routing, selection, backend, params)
            if self.shared_experts is not None:
                params = self.shared_experts.params(x.dtype)
                counts = selection.num_tokens_per_expert  # not read by a padded backend
                y = y + EXPERT_BACKENDS["bmm"].run(x[None], counts, params)[0]
        return y

    def losses(
        self, routing: Routing, context: RoutingContext, collector: Collector | None
    ) -> dict[str, Tensor]:
        """Scaled losses of one forward; those with weight 0 are left out."""
        config, found = self.config.losses, {}
        alpha = self.config.resolved_aux_alpha
        if alpha:
            load = self._load(routing, context, collector)
            found["aux"] = alpha * loss_fns.balance_loss(routing, load, context.data_group)
        if config.z_beta:
            found["z"] = config.z_beta * loss_fns.z_loss(routing, context.data_group)
        mu = config.locality_mu
        if mu is None:
            many = context.placement is not None and context.placement.num_nodes > 1
            mu = 0.01 if many and routing.probs is not None else 0.0
        if mu:
            if context.placement is None:
                raise ValueError(
                    f"losses.locality_mu={mu} needs RoutingContext(placement=ExpertPlacement(...))"
                )
            found["locality"] = mu * loss_fns.locality_loss(
                routing,
                context.placement,
                context.rank,
                config.locality_epsilon,
                context.node_group,
            )
        return found

    @torch.no_grad()
    def stats(self, routing: Routing, selection: Selection, limit: Limit) -> dict[str, Tensor]:
        """Counters of one forward; in training also what `after_step` learns from."""
        found = routing_stats(routing, selection, limit)
        if self.training:
            if routing.scores is not None:
                found["score_histogram"] = score_histogram(routing, self.calibration.scale)
            found.update(self.capacity.observe(routing))
        return found

    @torch.no_grad()
    def calibrate_from_pending(self, decay: float | None = None) -> None:
        """Consume the pending counters for the thresholds alone: no step, no schedule moves."""
        stats, self.pending = self.pending, {}
        if "score_histogram" in stats:
            self.calibration.update(stats["score_histogram"], target_kept(stats), decay)

    def train(self, mode: bool = True) -> MoE:
        super().train(mode)
        if not mode:
            self._warn_about_eval()
        return self

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"num_experts={config.num_experts}, top_k={config.top_k}, "
            f"router={config.router_config.name}, capacity={config.capacity_config.name}, "
            f"rank_by={self.rank_by}"
        )

    def _router_input(self, x: Tensor, context: RoutingContext) -> RouterInput:
        num_tokens, device = x.shape[0], x.device
        mask = context.valid_mask
        index = torch.arange(num_tokens, device=device) + context.global_token_offset
        replay = context.replay and context.replay.get(self.layer_index)
        return RouterInput(
            valid_mask=torch.ones(num_tokens, dtype=torch.bool, device=device)
            if mask is None
            else mask.reshape(-1),
            token_ids=None if context.token_ids is None else context.token_ids.reshape(-1),
            token_index=index,
            step=self.state.step,
            layer_index=self.layer_index,
            bonus=self._bonus(x, context),
            replay=replay or None,
        )

    def _bonus(self, x: Tensor, context: RoutingContext) -> Tensor | None:
        if not self.config.local_bonus or not self.training or context.placement is None:
            return None
        node = context.placement.node_of_rank[context.rank]
        bonus = torch.zeros(self.config.num_experts, device=x.device)
        bonus[list(context.placement.experts_on_node(node))] = self.config.local_bonus
        return bonus

    def _load(
        self, routing: Routing, context: RoutingContext, collector: Collector | None
    ) -> Tensor:
        """Choices that the balance loss counts as load, [E]."""
        mode = self.config.losses.aux_mode
        if mode == "previous":
            past = self.state.previous_load
            # Even before the first step: no gradient, whatever the ranks and micro-batches.
            return torch.where(past.sum() > 0, past, 1.0)
        load = routing.num_choices_per_expert()
        if mode == "micro":
            return load
        if mode == "running" and collector is not None:
            earlier = collector.earlier_choices(self)
            load = load if earlier is None else load + earlier
        return loss_fns.sum_over_group(load, context.data_group)

    def _backend(self, routing: Routing, selection: Selection) -> ExpertBackend:
        name = self.config.backend
        if name == "auto":
            bounded = selection.buffer_size < routing.num_tokens
            rows = routing.num_tokens * routing.top_k / routing.num_experts
            name = auto_backend(routing.expert.device.type, rows, self.traits.padded and bounded)
        return EXPERT_BACKENDS[name]

    def has_thresholds(self) -> bool:
        """Whether eval mode can select by calibrated thresholds."""
        return self.rank_by == "score" and self.traits.has_scores and self.calibration.is_calibrated

    def _warn_about_eval(self) -> None:
        for text in self.router.report():
            warnings.warn(text, stacklevel=3)
        dropless = self.config.capacity_config.name == "none"
        if self.eval_selection != "threshold" or dropless or self.has_thresholds():
            return
        if self.rank_by == "score" and self.traits.has_scores:
            reason = "its thresholds are not calibrated (train it, or run `etr calibrate`)"
        else:
            reason = "it drops by position in training, for which no causal threshold exists"
        warnings.warn(f"MoE layer evaluates dropless: {reason}", stacklevel=3)

    def _check(self, hidden_states: Tensor, context: RoutingContext) -> None:
        if not hidden_states.is_floating_point():
            raise ValueError(f"hidden_states has dtype {hidden_states.dtype}; it must be floating")
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"hidden_states has shape {tuple(hidden_states.shape)}; its last dimension must be "
                f"hidden_size={self.config.hidden_size}"
            )
        for name in ("valid_mask", "token_ids", "sequence_ids"):
            value = getattr(context, name)
            if value is not None and value.shape != hidden_states.shape[:-1]:
                raise ValueError(
                    f"context.{name} has shape {tuple(value.shape)}; it must be "
                    f"{tuple(hidden_states.shape[:-1])}, one value per token"
                )
        if context.valid_mask is not None and context.valid_mask.dtype != torch.bool:
            raise ValueError(
                f"context.valid_mask has dtype {context.valid_mask.dtype}; it must be bool, "
                "True = real token"
            )
        if self.config.debug and not bool(torch.isfinite(hidden_states).all()):
            bad = int((~torch.isfinite(hidden_states)).any(-1).sum())
            raise ValueError(
                f"hidden_states of MoE layer {self.layer_index} holds NaN or infinite values in "
                f"{bad} of {hidden_states[..., 0].numel()} tokens"
            )


def target_kept(stats: dict[str, Tensor]) -> Tensor:
    """Choosers that the thresholds must keep: what the policy, or the one it imitates, kept."""
    return stats.get("num_target_tokens_per_expert", stats["num_tokens_per_expert"])


def set_eval_selection(model: nn.Module, selection: EvalSelection) -> None:
    """Choose how the MoE layers of `model` select in eval mode."""
    if selection not in EVAL_SELECTIONS:
        raise ValueError(f"selection={selection!r} must be one of {', '.join(EVAL_SELECTIONS)}")
    for module in model.modules():
        if isinstance(module, MoE):
            module.eval_selection = selection
