"""In which order the parts of experts are loaded, and when all is done (arXiv 2504.15299)."""

from __future__ import annotations

from collections.abc import Sequence

Item = tuple[int, int]
"""An expert, and one of its levels from 0."""


def loading_order(tokens: Sequence[Sequence[int]]) -> list[Item]:
    """Highest expected bits first: who is loaded when, by how many tokens need it.

    Each expert's levels wait in order, since a level says nothing without those below; the one at
    the head that most tokens need goes next. Levels that nobody needs are not loaded.

    Args:
        tokens: of each expert, how many need each level or a higher one, which falls.
    """
    order: list[Item] = []
    heads = [0] * len(tokens)
    while True:
        waiting = [
            (-counts[head], expert)
            for expert, (counts, head) in enumerate(zip(tokens, heads, strict=True))
            if head < len(counts) and counts[head] > 0
        ]
        if not waiting:
            return order
        _, expert = min(waiting)
        order.append((expert, heads[expert]))
        heads[expert] += 1


def makespan(
    order: Sequence[Item],
    tokens: Sequence[Sequence[int]],
    loads: Sequence[float],
    compute: float,
) -> float:
    """When all is done where items are loaded one after another, and computed in that order.

    Args:
        order: items, each once.
        tokens: as in `loading_order`; an item's work is those that need its level or a higher one.
        loads: time to load each level.
        compute: time of one token.
    """
    loaded = done = 0.0
    for expert, level in order:
        loaded += loads[level]
        done = max(done, loaded) + compute * tokens[expert][level]
    return done
