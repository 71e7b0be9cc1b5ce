"""Hops of tokens from rank to rank under two placements, as heat maps side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etr.report.chart import titled
from etr.report.marks import ROWS, heat, layer, mark, panels
from etr.report.spec import Chart
from etr.report.style import CARD, COUNT_MAP, INK
from etr.report.wording import percent

MOST_WITH_COUNTS = 8
"""Ranks up to which each cell says its count; more are told by colour alone."""
SIDE = 231
"""Pixels of a panel: two stand in one row of a file."""


def hops_chart(flows: Mapping[str, Sequence[Sequence[int]]], num_nodes: int = 1) -> Chart:
    """Panels of one colour scale, in the order given, with what leaves a rank or node above them.

    Args:
        flows: hops from each rank to each rank, whole numbers [R][R], by the panel's title.
        num_nodes: equal nodes of consecutive ranks; lines part them.
    Raises:
        ValueError: tables of different sizes, or ranks that the nodes do not divide.
    """
    tables = {name: np.asarray(flow, dtype=np.int64) for name, flow in flows.items()}
    size = len(next(iter(tables.values()), ()))
    shapes = {table.shape for table in tables.values()}
    if not size or shapes != {(size, size)}:
        raise ValueError(f"flows has tables of shapes {sorted(shapes)}; all must be [R, R], R > 0")
    if num_nodes < 1 or size % num_nodes:
        raise ValueError(f"num_nodes={num_nodes} must divide the {size} ranks of flows")
    records = [
        {"panel": name, "variant": name, "row": rank, "value": row}
        for name, table in tables.items()
        for rank, row in enumerate(table.tolist())
    ]
    most = max(1, *(int(table.max()) for table in tables.values()))
    chart = panels(
        records,
        {"layer": _layers(size, num_nodes, most)},
        height=SIDE,
        least=SIDE,
        transform=ROWS,
    )
    lines = [_said(name, table, num_nodes) for name, table in tables.items()]
    said = "From an expert's rank (row) to that of one in the next layer (column)"
    parted = "; lines part nodes" if num_nodes > 1 else ""
    return titled(chart, "Hops of tokens between ranks", [f"{said}{parted}.", *lines])


def _layers(size: int, num_nodes: int, most: int) -> list[Chart]:
    """Cells, their counts where there is room, and the borders of nodes."""
    some = list(range(0, size, -(-size // MOST_WITH_COUNTS)))
    labels = {"values": some, "tickCount": len(some), "labelOverlap": False, "labelFlush": False}
    # By roots, for what is left between ranks to differ beside what stays on them.
    scale = {"type": "sqrt", "range": COUNT_MAP}
    cells = heat("hops", (0, most), "to rank", "from rank", None, labels, scale)
    ticks = sorted({0, most // 4, most})
    cells["encoding"]["color"]["legend"] |= {"format": ",d", "values": ticks}
    found = [cells]
    place = {axis: cells["encoding"][axis] for axis in ("x", "y")}
    if size <= MOST_WITH_COUNTS:
        light = {"test": f"datum.value > {0.4 * most}", "value": CARD.css}
        color = {"condition": light, "value": INK.css}
        text = {"field": "value", "type": "quantitative", "format": ".3~s"}
        found.append(layer(mark("text", fontSize=9), **place, text=text, color=color))
    if num_nodes > 1:
        for axis, field, other in (("x", "column", "row"), ("y", "row", "column")):
            first = f"datum.{field} && datum.{field} % {size // num_nodes} == 0 && !datum.{other}"
            border = {axis: {**place[axis], "bandPosition": 0}}
            line = layer(mark("rule", strokeWidth=1.2, color=INK.css), **border)
            found.append({"transform": [{"filter": first}], **line})
    return found


def _said(name: str, table: NDArray[Any], num_nodes: int) -> str:
    """What of the hops leaves a rank and a node."""
    total, rank = int(table.sum()), np.arange(len(table))
    if not total:
        return f"{name}: no hops."
    node = rank // (len(table) // num_nodes)
    shares = [percent(table[of[:, None] != of].sum() / total) for of in (rank, node)]
    nodes = f", {shares[1]} their node" if num_nodes > 1 else ""
    return f"{name}: {shares[0]} of {total:,} hops leave their rank{nodes}."
