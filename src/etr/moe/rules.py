"""What goes with what: computed from a router's traits and a policy's needs."""

from __future__ import annotations

from collections.abc import Iterable

from etr.moe.capacity import CAPACITIES, CapacityConfig
from etr.moe.experts import BankConfig
from etr.moe.losses import Loss
from etr.moe.routers import ROUTERS, RouterConfig
from etr.moe.select import Normalize, RankBy


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
    if traits.expert_pool == "all":
        return (
            f"capacity {capacity.name!r} counts an expert's choosers, and expert_pool='all' ranks "
            "them among all tokens; use expert_pool='choosers'"
        )
    return None


def unsupported_bank(bank: BankConfig, router: RouterConfig, losses: Iterable[Loss]) -> str | None:
    """Why a bank cannot go with a router or with losses, or None."""
    own, asked = _bare(bank).ternary, router.traits.ternary
    if None not in (own, asked) and own != asked:
        return (
            f"experts={bank.name!r} has nulls={own} choices without weights, and router "
            f"{router.name!r} has nulls={asked}; they must have as many"
        )
    for fact, why in bank.needs.items():
        if not getattr(router.traits, fact):
            what = _WORDS.get(fact, fact)
            return (
                f"experts={bank.name!r} {why}, and router {router.name!r} has no {what}; use one "
                "that has, such as 'token_choice' with softmax gates"
            )
    for row in losses:
        if row.needs_experts and not bank.one_width and row.weight_for(router.traits):
            return (
                f"loss {row.name!r} sees experts of one width, and those of experts={bank.name!r} "
                "have several; use 'uniform', or give the loss weight 0"
            )
    return None


_WORDS = {"has_probs": "probabilities", "gates_are_probs": "gates that are its probabilities"}


def unsupported_weights(
    bank: BankConfig, router: RouterConfig, normalize: Normalize | None, scale: float
) -> str | None:
    """Why combine weights cannot be made so of a router's gates, or None.

    Args:
        normalize, scale: options of these names, as they are resolved.
    """
    if router.traits.ternary is not None and normalize not in (None, "none"):
        return (
            f"normalize={normalize!r}: weights of router {router.name!r} have signs and are "
            "divided by a sum of their own; use normalize='none'"
        )
    why = _bare(bank).of_gates
    if why is not None and (normalize, scale) != ("none", 1.0):
        return (
            f"experts={bank.name!r} {why}: normalize={normalize!r} must be 'none', and "
            f"routed_scale={scale} must be 1"
        )
    return None


def unsupported_run(bank: BankConfig, **engines: str) -> str | None:
    """Why a bank cannot be run by a backend or a dispatcher that is asked for, or None."""
    why = _bare(bank).runs_itself
    for name, value in engines.items():
        if why is not None and value != "auto":
            return f"{name}={value!r}: experts={bank.name!r} {why}; use 'auto'"
    return None


def _bare(bank: BankConfig) -> BankConfig:
    """The bank that layers share, where they do."""
    return getattr(bank, "wrapped", bank)


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
