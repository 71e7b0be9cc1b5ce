"""MoEConfig: every choice about one layer, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from etr.moe.capacity import CAPACITIES, CapacityConfig
from etr.moe.checked import check_types
from etr.moe.dispatch import parse_dispatcher
from etr.moe.experts import EXPERT_BACKENDS, Activation
from etr.moe.losses import LossConfig
from etr.moe.routers import ROUTERS, RouterConfig
from etr.moe.select import Normalize, RankBy

EvalSelection = Literal["threshold", "dropless", "batch"]
EVAL_SELECTIONS: tuple[EvalSelection, ...] = ("threshold", "dropless", "batch")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One MoE layer. `router` and `capacity` are a name or a config object."""

    hidden_size: int
    """Width H of the tokens."""
    intermediate_size: int
    """Width I inside each expert."""
    num_experts: int
    """Routed experts E."""
    top_k: int = 1
    """Experts a token may choose."""
    router: str | RouterConfig = "etr"
    """Name in ROUTERS, or a router's config."""
    capacity: str | CapacityConfig | None = None
    """Name in CAPACITIES, a policy's config, or None for the router's own default."""
    rank_by: RankBy | None = None
    """Whom experts drop first: the lowest score, or the latest position. None: the router's own."""
    normalize: Normalize | None = None
    """Divide combine weights by their sum over the token's chosen or kept experts. None: 'none'
    for top_k 1 or where experts choose, else 'chosen'."""
    losses: LossConfig = field(default_factory=LossConfig)
    """Weights of the router's losses."""
    activation: Activation = "swiglu"
    """swiglu, clamped_swiglu, gelu or relu2."""
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
    """Width of each shared expert. None: intermediate_size."""
    shared_gate: bool = False
    """Weigh the shared experts by a learned sigmoid of the token."""
    backend: str = "auto"
    """Name in EXPERT_BACKENDS, or auto: grouped_mm on a CPU, elsewhere bmm for padded presets and
    grouped_mm for others."""
    dispatch: str = "auto"
    """Name in DISPATCHERS, perhaps with options (chunked:all_to_all,chunks=4), or auto: permute on
    one rank, all_to_all on several, group_wise where ranks hold the same tokens."""
    eval_selection: EvalSelection = "threshold"
    """Selection in eval mode. threshold: causal, calibrated in training. dropless: nothing is
    dropped. batch: the training policy, in which later tokens change earlier ones."""
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
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={self.num_experts}: a token cannot choose "
                "more experts than there are"
            )
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts} must be >= 0")
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("shared_gate=True needs num_shared_experts >= 1, an expert to weigh")
        if self.shared_intermediate_size is not None and self.shared_intermediate_size < 1:
            raise ValueError(
                f"shared_intermediate_size={self.shared_intermediate_size} must be at least 1, or "
                "None for intermediate_size"
            )
        for name in ("swiglu_limit", "swiglu_alpha", "routed_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        _check_name("backend", self.backend, ("auto", *EXPERT_BACKENDS))
        if self.dispatch != "auto":
            parse_dispatcher(self.dispatch)
        if self.top_k == 1 and self.normalize not in (None, "none"):
            raise ValueError(
                f"normalize={self.normalize!r} with top_k=1 makes every weight 1, so the router "
                "gets no gradient; use normalize='none'"
            )
        router, capacity = self.router_config, self.capacity_config
        router.check(self.hidden_size, self.num_experts, self.top_k)
        reason = unsupported(router, capacity, self.rank_by)
        if reason is not None:
            raise ValueError(reason)
        self._check_losses(router)

    def _check_losses(self, router: RouterConfig) -> None:
        needs = {"aux_alpha": "has_probs", "z_beta": "has_probs", "locality_mu": "has_probs"}
        for name, trait in needs.items():
            if getattr(self.losses, name) and not getattr(router.traits, trait):
                raise ValueError(
                    f"losses.{name}={getattr(self.losses, name)}: router {router.name!r} has no "
                    "probabilities, so the loss is undefined; use 0"
                )
        if self.losses.aux_alpha and not router.traits.tokens_choose:
            raise ValueError(
                f"losses.aux_alpha={self.losses.aux_alpha}: in router {router.name!r} experts "
                "choose, so the load is even by construction; use 0"
            )
        if self.local_bonus and not router.traits.has_scores:
            raise ValueError(
                f"local_bonus={self.local_bonus}: router {router.name!r} has no scores to add to"
            )

    @property
    def router_config(self) -> RouterConfig:
        """The router's config, from its name if need be."""
        if isinstance(self.router, RouterConfig):
            return self.router
        _check_name("router", self.router, ROUTERS)
        return ROUTERS[self.router]()

    @property
    def capacity_config(self) -> CapacityConfig:
        """The policy's config, from its name or the router's default if need be."""
        if isinstance(self.capacity, CapacityConfig):
            return self.capacity
        return parse_capacity(self.capacity or self.router_config.traits.default_capacity)

    @property
    def resolved_rank_by(self) -> RankBy:
        """Order in which experts fill up."""
        return resolve_rank_by(self.router_config, self.capacity_config, self.rank_by)

    @property
    def resolved_normalize(self) -> Normalize:
        """How combine weights are normalised."""
        if self.normalize is not None:
            return self.normalize
        one = self.top_k == 1 or not self.router_config.traits.tokens_choose
        return "none" if one else "chosen"

    @property
    def shared_width(self) -> int:
        """Summed width of the shared experts."""
        return self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)

    @property
    def resolved_aux_alpha(self) -> float:
        """Weight of the balance loss."""
        if self.losses.aux_alpha is not None:
            return self.losses.aux_alpha
        return 0.01 if self.router_config.traits.can_balance else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values; `from_dict` restores an equal config."""
        result = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        result["router"] = config_to_dict(self.router_config)
        result["capacity"] = config_to_dict(self.capacity_config)
        result["losses"] = dataclasses.asdict(self.losses)
        return result

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """Inverse of `to_dict`; names alone are accepted for router and capacity."""
        values = dict(values)
        unknown = sorted(set(values) - {entry.name for entry in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"MoEConfig has no field {', '.join(unknown)}")
        if isinstance(values.get("router"), dict):
            values["router"] = config_from_dict(ROUTERS, "router", values["router"])
        if isinstance(values.get("capacity"), dict):
            values["capacity"] = config_from_dict(CAPACITIES, "capacity", values["capacity"])
        if isinstance(values.get("losses"), dict):
            values["losses"] = LossConfig(**values["losses"])
        return cls(**values)


def unsupported(
    router: RouterConfig, capacity: CapacityConfig, rank_by: RankBy | None = None
) -> str | None:
    """Why a router cannot go with a policy (and an order of the queue), or None."""
    traits = router.traits
    if rank_by is not None and rank_by not in traits.rank_by:
        return (
            f"rank_by={rank_by!r} does not go with router {router.name!r}, whose experts can fill "
            f"up by {' or '.join(traits.rank_by)} only"
        )
    if capacity.name == "none" and not traits.tokens_choose:
        return (
            f"capacity 'none' does not go with router {router.name!r}: experts choose, and without "
            "a capacity every expert would take every token"
        )
    if capacity.needs_probs and not traits.has_probs:
        return f"capacity {capacity.name!r} sums probabilities, and router {router.name!r} has none"
    if (capacity.needs_cosine or capacity.floor != "none") and not traits.has_cosine:
        what = (
            f"capacity {capacity.name!r}" if capacity.needs_cosine else f"floor={capacity.floor!r}"
        )
        return (
            f"{what} bounds the capacity by cosine affinities, and the scores of router "
            f"{router.name!r} are none; those of etr_paper or locmoe are"
        )
    if not capacity.needs_score_ranking:
        return None
    if resolve_rank_by(router, capacity, rank_by) != "score":
        return (
            f"capacity {capacity.name!r} keeps the best choosers, so it needs rank_by='score', "
            f"which router {router.name!r} cannot or was told not to do"
        )
    if getattr(router, "expert_pool", "choosers") == "all":
        return (
            f"capacity {capacity.name!r} counts an expert's choosers, and expert_pool='all' ranks "
            "them among all tokens; use expert_pool='choosers'"
        )
    return None


def resolve_rank_by(
    router: RouterConfig, capacity: CapacityConfig, rank_by: RankBy | None
) -> RankBy:
    """The order asked for; else by score where the policy needs it and the router can; else the
    router's default."""
    if rank_by is not None:
        return rank_by
    if capacity.needs_score_ranking and "score" in router.traits.rank_by:
        return "score"
    return router.traits.rank_by[0]


def support_table() -> dict[tuple[str, str], str | None]:
    """Every router x policy cell at default options: None if supported, else the reason."""
    return {
        (router, capacity): unsupported(ROUTERS[router](), CAPACITIES[capacity]())
        for router in ROUTERS
        for capacity in CAPACITIES
    }


def config_to_dict(config: RouterConfig | CapacityConfig) -> dict[str, Any]:
    """A named config as plain values with its `name`."""
    values: dict[str, Any] = {"name": config.name}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        values[entry.name] = config_to_dict(value) if isinstance(value, CapacityConfig) else value
    return values


def config_from_dict(table: dict[str, Any], kind: str, values: dict[str, Any]) -> Any:
    """Inverse of `config_to_dict`."""
    values = dict(values)
    name = values.pop("name", None)
    _check_name(kind, name, table)
    nested = {
        key: config_from_dict(CAPACITIES, key, value) if isinstance(value, dict) else value
        for key, value in values.items()
    }
    known = {entry.name for entry in dataclasses.fields(table[name])}
    unknown = sorted(set(nested) - known)
    if unknown:
        raise ValueError(
            f"{kind} {name!r} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    return table[name](**nested)


def parse_router(text: str) -> RouterConfig:
    """Read ``name`` or ``name:option=value,option=value`` as a router's config."""
    return _parse(ROUTERS, "router", text)


def parse_capacity(text: str) -> CapacityConfig:
    """Read ``name`` or ``name:option=value,option=value`` as a policy's config."""
    return _parse(CAPACITIES, "capacity", text)


def _parse(table: dict[str, Any], kind: str, text: str) -> Any:
    name, _, options = text.partition(":")
    values: dict[str, Any] = {"name": name}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"{kind} option {option!r} in {text!r} must read option=value")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return config_from_dict(table, kind, values)


def _check_name(field: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        names = ", ".join(str(name) for name in allowed)
        raise ValueError(f"{field}={value!r} is unknown; choose one of {names}")
