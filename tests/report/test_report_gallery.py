"""docs/gallery.md shows every figure of the table, with pictures of a real run."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from etr.report import FIGURES

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "images" / "gallery"
# What the small run of one process does not log.
WITHOUT_PICTURE = {"traffic"}


@pytest.fixture(scope="module")
def sections() -> dict[str, str]:
    """Text of the page below each heading."""
    parts = re.split(r"^### (.+)$", (DOCS / "gallery.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_figure_has_its_section_in_the_order_of_the_table(sections: dict[str, str]) -> None:
    assert list(sections) == [spec.title for spec in FIGURES]


@pytest.mark.parametrize("spec", FIGURES, ids=lambda spec: spec.key)
def test_every_figure_is_shown_and_explained(sections: dict[str, str], spec: object) -> None:
    text = sections[spec.title]  # type: ignore[attr-defined]
    key = spec.key  # type: ignore[attr-defined]
    assert f"`{key}`" in text
    if key in WITHOUT_PICTURE:
        assert "![" not in text
        return
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
    assert picture == f"images/gallery/{key}.svg"
    root = ET.parse(DOCS / picture).getroot()
    assert root.tag.endswith("svg")


def test_no_picture_is_left_over_and_all_are_small() -> None:
    files = list(PICTURES.iterdir())
    keys = {spec.key for spec in FIGURES} - WITHOUT_PICTURE
    assert {path.name for path in files} == {f"{key}.svg" for key in keys}
    assert sum(path.stat().st_size for path in files) < 1e6
