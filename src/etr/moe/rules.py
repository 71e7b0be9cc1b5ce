"""What goes with what: computed from a router's traits and a policy's needs."""

from __future__ import annotations

from collections.abc import Iterable

from etr.moe.capacity import CAPACITIES, CapacityConfig
from etr.moe.experts import BankConfig
from etr.moe.losses import Loss
from etr.moe.routers import ROUTERS, RouterConfig
from etr.moe.select import RankBy


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
    for fact, why in bank.needs.items():
        if not getattr(router.traits, fact):
            what = _WORDS.get(fact, fact)
            return (
                f"experts={bank.name!r} {why}, and router {router.name!r} has no {what}; use one "
                "that has, such as 'token_choice'"
            )
    for row in losses:
        if row.needs_experts and not bank.one_width and row.weight_for(router.traits):
            return (
                f"loss {row.name!r} sees experts of one width, and those of experts={bank.name!r} "
                "have several; use 'uniform', or give the loss weight 0"
            )
    return None


_WORDS = {"has_probs": "probabilities"}


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
