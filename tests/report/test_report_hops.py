"""The picture of hops between ranks: what each cell says, one scale, borders of nodes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from etr.report.chart import save_svg
from etr.report.hops import MOST_WITH_COUNTS, hops_chart
from etr.report.style import COUNT_MAP, INK

BEFORE, AFTER = "before, consecutive", "after, exflow"


def drawn(tmp_path: Path, before: list, after: list, nodes: int = 1) -> ET.Element:
    path = tmp_path / "plan.svg"
    save_svg(hops_chart({BEFORE: before, AFTER: after}, nodes), path)
    return ET.parse(path).getroot()


def words(root: ET.Element) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]


def cells(root: ET.Element) -> dict[tuple[float, float], str]:
    """Colours by the middle of each cell's left side, which paths of one colour share."""
    return {
        (float(x), float(y)): path.get("stroke", "")
        for path in root.iter()
        for x, y in re.findall(r"M([-\d.]+),([-\d.]+)h", path.get("d", ""))
        if path.get("stroke-width") and not path.get("fill")
    }


def channels(colour: str) -> np.ndarray:
    """Red, green and blue of #rrggbb."""
    return np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])


def borders(root: ET.Element) -> list[ET.Element]:
    lines = (element for element in root.iter() if element.tag.endswith("line"))
    return [line for line in lines if line.get("stroke") == INK.light]


def test_counts_shares_and_titles_are_written(tmp_path: Path) -> None:
    root = drawn(tmp_path, [[1, 2], [3, 4]], [[8, 0], [1234, 9]])
    found = words(root)
    for word in ("1", "2", "3", "4", "8", "0", "1.23k", "9", BEFORE, AFTER):
        assert word in found
    said = " ".join(found).replace("\N{NO-BREAK SPACE}", " ")
    assert f"{BEFORE}: 50.0 % of 10 hops leave their rank." in said
    assert f"{AFTER}: 98.6 % of 1,251 hops leave their rank." in said
    assert "node" not in said
    assert not borders(root)


def test_panels_share_one_scale_and_a_rank_is_a_row(tmp_path: Path) -> None:
    """Ends of the scale are none and the most of both; a quarter of it is its middle."""
    size = 9
    before, after = np.zeros((2, size, size), dtype=int)
    before[0, 1], after[2, 0] = 25, 100
    root = drawn(tmp_path, before.tolist(), after.tolist(), 3)
    found = cells(root)
    columns = sorted({x for x, _ in found})
    rows = sorted({y for _, y in found})
    assert (len(columns), len(rows)) == (size, size)  # of both panels, each in its own group
    colours = {path.get("stroke", "") for path in root.iter() if path.get("stroke-width")}
    middle = (channels(COUNT_MAP[0]) + channels(COUNT_MAP[1])) / 2
    assert {*COUNT_MAP} < colours
    assert min(np.abs(channels(colour) - middle).max() for colour in colours) <= 1
    (most,) = (path for path in root.iter() if path.get("stroke") == COUNT_MAP[1])
    assert most.get("d", "").startswith(f"M{columns[0]:g},{rows[2]:g}h")


@pytest.mark.parametrize(("size", "nodes"), [(4, 2), (6, 3), (32, 4), (2, 1)])
def test_borders_of_nodes_and_no_counts_where_cells_are_small(
    tmp_path: Path, size: int, nodes: int
) -> None:
    flow = (7000 + np.arange(size * size).reshape(size, size)).tolist()
    root = drawn(tmp_path, flow, flow, nodes)
    assert len(borders(root)) == 2 * 2 * (nodes - 1)  # panels, axes
    counts = [word for word in words(root) if re.fullmatch(r"[\d.]+k", word)]
    assert len(counts) == (2 * size * size if size <= MOST_WITH_COUNTS else 0)


def test_no_hops_one_rank_and_names_with_marks(tmp_path: Path) -> None:
    assert f"{BEFORE}: no hops." in " ".join(words(drawn(tmp_path, [[0]], [[5]])))
    path = tmp_path / "a \"b\" & <c> 'd' (1).svg"
    save_svg(hops_chart({"<a> & b": [[0]]}), path)
    text = path.read_text()
    assert "<a> & b" in words(ET.fromstring(text))
    ids = re.findall(r' id="([^"]*)"', text)
    assert ids
    assert all(re.fullmatch(r"[\w-]+", name) for name in ids)


@pytest.mark.parametrize(
    ("flows", "nodes", "message"),
    [
        ({}, 1, r"shapes \[\]"),
        ({"a": []}, 1, r"shapes \[\(0,\)\]"),
        ({"a": [[1, 2]]}, 1, r"shapes \[\(1, 2\)\]"),
        ({"a": [[1]], "b": [[1, 2], [3, 4]]}, 1, r"shapes \[\(1, 1\), \(2, 2\)\]"),
        ({"a": [[1, 2], [3, 4]]}, 3, "num_nodes=3 must divide the 2 ranks"),
        ({"a": [[1]]}, 0, "num_nodes=0"),
    ],
)
def test_tables_that_do_not_go_together_are_refused(flows, nodes, message) -> None:
    with pytest.raises(ValueError, match=message):
        hops_chart(flows, nodes)
