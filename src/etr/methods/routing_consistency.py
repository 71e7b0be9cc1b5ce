"""Local routing consistency: do neighbouring tokens use the same experts? (arXiv 2505.16056)

Both measures are `etr.systems.consistency`'s, and stand in every summary of a trace.
"""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.systems.consistency import MEASURES, SegmentCache, SegmentRouting

CARD = Card(
    name="routing_consistency",
    title="Local routing consistency",
    summary="SRP and SCH: how well few experts, held for a window of tokens, serve it",
    paper="2505.16056",
    level="system",
    branch="offloading and caching",
    rows=(Row(table=MEASURES, kind=SegmentRouting), Row(table=MEASURES, kind=SegmentCache)),
    against="sch",
    claim=(
        "A constant trace has SRP = SCH = 1; two experts in turn have SRP = 2/3 in windows of 2 "
        "and more tokens and SCH = 1/2 with one expert held; with all held SCH = 1. Experts 0, 0, "
        "1, 0 in windows of 2 have SRP = 3/4, and SCH = 2/3 with one held."
    ),
    departs=(
        "The cache of SCH stands still within a window; the paper also describes one that replaces "
        "experts token by token."
    ),
)
