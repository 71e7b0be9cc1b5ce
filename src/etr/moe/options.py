"""LayerOptions: every choice about one layer but its four sizes, checked when it is made."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

from etr.moe.capacity import CAPACITIES, CapacityConfig
from etr.moe.checked import check_types
from etr.moe.dispatch import DISPATCHERS
from etr.moe.experts import BANKS, EXPERT_BACKENDS, Activation, BankConfig
from etr.moe.losses import Loss, LossConfig, Losses, loss_rows
from etr.moe.losses.rows import check_losses, losses_from_plain, losses_to_plain
from etr.moe.routers import ROUTERS, RouterConfig
from etr.moe.rules import resolve_rank_by, unsupported, unsupported_bank, unsupported_run
from etr.moe.select import Normalize, RankBy
from etr.moe.serving import serving_of
from etr.moe.table import check_name, config_to_dict


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """One MoE layer but for its sizes. Router, capacity and experts are a text or a config."""

    router: str | RouterConfig = "etr"
    """Name in ROUTERS, perhaps with options (etr:frame=fixed), or a router's config."""
    capacity: str | CapacityConfig | None = None
    """Name in CAPACITIES, perhaps with options (factor:capacity_factor=0.6), a policy's config, or
    None for the router's own default."""
    rank_by: RankBy | None = None
    """Whom experts drop first: the lowest score, or the latest position. None: the router's own."""
    normalize: Normalize | None = None
    """Divide combine weights by their sum over the token's chosen or kept experts. None: the
    router's own, else 'none' for top_k 1 or where experts choose, and 'chosen' otherwise."""
    losses: Losses = field(default_factory=LossConfig)
    """What is added to the loss: weights, rows of LOSSES, or their text, such as
    balance:mode=running,z:weight=1e-3."""
    experts: str | BankConfig = "uniform"
    """Name in BANKS, perhaps with options, or a bank's config: which weights a chosen expert means.
    uniform: its own. nulls: further choices cost nothing. widths: experts of unequal widths.
    shared: several layers of a model have one bank."""
    activation: Activation = "swiglu"
    """swiglu, clamped_swiglu, gelu, relu2 or silu."""
    swiglu_limit: float = 7.0
    """Where clamped_swiglu cuts what it multiplies, no unit."""
    swiglu_alpha: float = 1.702
    """Gain inside the sigmoid of clamped_swiglu."""
    expert_bias: bool = False
    """Both projections of the routed experts have biases."""
    routed_scale: float = 1.0
    """Factor on all combine weights, after any normalisation."""
    num_shared_experts: int = 0
    """Experts that every token passes, beside the routed ones."""
    shared_intermediate_size: int | None = None
    """Width of each shared expert. None: that of the routed ones."""
    shared_gate: bool = False
    """Weigh the shared experts by a learned sigmoid of the token."""
    inner_steps: int = 1
    """Times that a token passes the experts, each time by a router of its own; a further step also
    sees what those before it added."""
    backend: str = "auto"
    """Name in EXPERT_BACKENDS, or auto: grouped_mm on a CPU, elsewhere bmm for padded presets and
    grouped_mm for others; a bank may have one of its own."""
    dispatch: str = "auto"
    """Name in DISPATCHERS, perhaps with options (chunked:all_to_all,chunks=4), or auto: permute on
    one rank, all_to_all on several, group_wise where ranks hold the same tokens."""
    eval_selection: str = "threshold"
    """Name in SERVING, perhaps with options: how the layer routes in eval mode. threshold: causal,
    calibrated in training. dropless: nothing is dropped. batch: the training policy, in which later
    tokens change earlier ones."""
    local_bonus: float = 0.0
    """Added in training to the selection score of experts on the token's node, not to weights."""
    debug: bool = False
    """Check inputs for NaN and infinity, and that all ranks are at the same exchange; slow: each
    check waits for the device, and for the other ranks."""

    def __post_init__(self) -> None:
        if isinstance(self.capacity, int | float):
            raise ValueError(
                f"capacity={self.capacity} must be the name or the config of a policy; a capacity "
                f"factor is capacity='factor:capacity_factor={self.capacity}'"
            )
        check_types(self)
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} must be >= 0")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps={self.inner_steps} must be at least 1")
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("shared_gate=True needs num_shared_experts >= 1, an expert to weigh")
        if self.shared_intermediate_size is not None and self.shared_intermediate_size < 1:
            raise ValueError(
                f"shared_intermediate_size={self.shared_intermediate_size} must be at least 1, or "
                "None for the width of the routed experts"
            )
        for name in ("swiglu_limit", "swiglu_alpha", "routed_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        check_name("backend", self.backend, ("auto", *EXPERT_BACKENDS))
        if self.dispatch != "auto":
            DISPATCHERS.parse(self.dispatch)
        serving_of(self.eval_selection, "eval_selection")
        router = self.router_config
        reason = unsupported(router, self.capacity_config, self.rank_by)
        if reason is not None:
            raise ValueError(reason)
        check_losses(self.losses, router)
        reason = unsupported_bank(self.bank_config, router, self.loss_rows)
        engines = {"backend": self.backend, "dispatch": self.dispatch}
        reason = reason or unsupported_run(self.bank_config, **engines)
        if reason is not None:
            raise ValueError(reason)
        if self.local_bonus and not router.traits.has_scores:
            raise ValueError(
                f"local_bonus={self.local_bonus}: router {router.name!r} has no scores to add to"
            )

    @property
    def router_config(self) -> RouterConfig:
        """The router's config, from its text if need be."""
        return ROUTERS.parse(self.router) if isinstance(self.router, str) else self.router

    @property
    def capacity_config(self) -> CapacityConfig:
        """The policy's config, from its text or the router's default if need be."""
        if isinstance(self.capacity, CapacityConfig):
            return self.capacity
        return CAPACITIES.parse(self.capacity or self.router_config.traits.default_capacity)

    @property
    def bank_config(self) -> BankConfig:
        """The bank's config, from its text if need be."""
        return self.experts if isinstance(self.experts, BankConfig) else BANKS.parse(self.experts)

    @property
    def loss_rows(self) -> tuple[Loss, ...]:
        """The losses, whatever their weights."""
        return loss_rows(self.losses)

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by name, as it is without a placement of experts."""
        traits = self.router_config.traits
        return {row.name: row.weight_for(traits) for row in self.loss_rows}

    @property
    def resolved_rank_by(self) -> RankBy:
        """Order in which experts fill up."""
        return resolve_rank_by(self.router_config, self.capacity_config, self.rank_by)

    def options(self) -> dict[str, Any]:
        """The options by name, as another kind of these takes them."""
        return {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(LayerOptions)}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `from_dict` restores an equal config."""
        result = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        result["router"] = config_to_dict(self.router_config)
        result["capacity"] = config_to_dict(self.capacity_config)
        result["experts"] = config_to_dict(self.bank_config)
        result["losses"] = losses_to_plain(self.losses)
        return result

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; texts are accepted for router, capacity and experts."""
        values = dict(values)
        unknown = sorted(set(values) - {entry.name for entry in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {', '.join(unknown)}")
        if isinstance(values.get("router"), dict):
            values["router"] = ROUTERS.from_dict(values["router"])
        if isinstance(values.get("capacity"), dict):
            values["capacity"] = CAPACITIES.from_dict(values["capacity"])
        if isinstance(values.get("experts"), dict):
            values["experts"] = BANKS.from_dict(values["experts"])
        if "losses" in values:
            values["losses"] = losses_from_plain(values["losses"])
        return cls(**values)


OPTIONS = tuple(entry.name for entry in dataclasses.fields(LayerOptions))
"""Their names."""
