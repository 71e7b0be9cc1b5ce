"""MoEConfig: the sizes of one layer, and every choice about it, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from etr.field_notes import documented
from etr.moe.capacity import CAPACITIES
from etr.moe.moved import moved
from etr.moe.options import LayerOptions
from etr.moe.routers import ROUTERS
from etr.moe.rules import unsupported_weights
from etr.moe.select import Normalize

__getattr__ = moved(
    __name__,
    {
        "EVAL_SELECTIONS": "etr.moe.serving",
        "config_to_dict": "etr.table",
        **dict.fromkeys(("resolve_rank_by", "support_table", "unsupported"), "etr.moe.rules"),
    },
)

SIZES = ("hidden_size", "intermediate_size", "num_experts", "top_k")
"""The fields that are not options."""


@documented
@dataclass(frozen=True, kw_only=True)
class MoEConfig(LayerOptions):
    """One MoE layer: four sizes, and the fields of `LayerOptions`."""

    hidden_size: int
    """Width H of the tokens."""
    intermediate_size: int
    """Width I inside each expert."""
    num_experts: int
    """Routed experts E."""
    top_k: int = 1
    """Experts a token may choose."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.bank_config.check(self.num_experts, self.hidden_size)
        if self.top_k > self.num_choices:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={self.num_choices}: a token cannot choose "
                "more experts than there are"
            )
        if self._one_expert and self.normalize not in (None, "none"):
            raise ValueError(
                f"normalize={self.normalize!r} with top_k=1 makes every weight 1, so the router "
                "gets no gradient; use normalize='none'"
            )
        self.router_config.check(self.hidden_size, self.num_choices, self.top_k)
        reason = unsupported_weights(
            self.bank_config, self.router_config, self.resolved_normalize, self.routed_scale
        )
        if reason is not None:
            raise ValueError(reason)
        made, traits = self.bank_config.choices_of_a_token, self.router_config.traits
        fixed = traits.fixed_k and traits.tokens_choose
        if made is not None and not (fixed and self.top_k == made):
            raise ValueError(
                f"experts={self.bank_config.name!r}: every token must choose {made} experts, and "
                f"with router {self.router_config.name!r} and top_k={self.top_k} it does not"
            )

    @property
    def num_choices(self) -> int:
        """What the router scores: the experts, and choices beside them that have no weights."""
        return self.bank_config.num_choices(self.num_experts)

    @property
    def resolved_normalize(self) -> Normalize:
        """How combine weights are normalised."""
        if self.normalize is not None:
            return self.normalize
        traits = self.router_config.traits
        one = self._one_expert or not traits.tokens_choose
        return traits.normalize or ("none" if one else "chosen")

    @property
    def most_choices(self) -> int:
        """Most experts that a token may choose."""
        return self.top_k if self.router_config.traits.fixed_k else self.num_choices

    @property
    def _one_expert(self) -> bool:
        return self.top_k == 1 and self.router_config.traits.fixed_k

    @property
    def shared_width(self) -> int:
        """Summed width of the shared experts."""
        return self.num_shared_experts * (self.shared_intermediate_size or self.intermediate_size)


parse_router, parse_capacity = ROUTERS.parse, CAPACITIES.parse
