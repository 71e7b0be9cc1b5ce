"""README's table and picture are what their tool makes of the results and the default schedule."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

import etr
from etr.moe.capacity import Schedule
from etr.moe.config import parse_capacity

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def readme() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tool", ROOT / "tools/readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["readme_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_pasted_table_is_that_of_the_stored_demo(readme: ModuleType) -> None:
    text = readme.PAGE.read_text(encoding="utf-8")
    assert readme.renewed(text) == text, "run `python tools/readme.py`"
    assert "variant" in text.partition(readme.BEGIN)[2].partition(readme.END)[0]


def test_the_sentence_on_speed_quotes_the_page(readme: ModuleType) -> None:
    text, page = (
        p.read_text(encoding="utf-8") for p in (readme.PAGE, readme.SPEED.parent / "speed.md")
    )
    said = text.partition(readme.SPEED_BEGIN)[2].partition(readme.SPEED_END)[0]
    (row,) = (line for line in page.splitlines() if line.startswith("| saved bytes, etr dropless"))
    worst, best = (row.split(" | ")[place].strip("x ") for place in (2, 4))
    assert f"saves {best} to {worst} of" in " ".join(said.split())


def test_the_stored_demo_is_the_recipe() -> None:
    from etr.files import read_json
    from etr.recipes import quick_demo

    stored, config = read_json(ROOT / "docs/results/demo-quick.json"), quick_demo()
    assert stored["command"] == "etr demo"
    assert tuple(stored["config"]["variants"]) == config.variants
    assert stored["config"]["run"]["steps"] == config.run.steps
    assert stored["config"]["run"]["data"]["sequence_length"] == config.run.data.sequence_length


def test_the_pictures_are_what_the_tool_draws(readme: ModuleType) -> None:
    for path, text in readme.pictures().items():
        assert path.read_text(encoding="utf-8") == text, "run `python tools/readme.py`"
        ElementTree.fromstring(text)


def test_the_picture_is_true_to_the_layer(readme: ModuleType) -> None:
    """Factors are the default's, and an expert keeps its highest-ranked choosers."""
    plan = parse_capacity(etr.ROUTERS["etr"]().traits.default_capacity)
    assert isinstance(plan, Schedule)
    assert [factor for _, factor in readme.STAGES] == [plan.start_factor, plan.end_factor]
    assert [readme.capacity(factor) for _, factor in readme.STAGES] == [1, 3]
    assert [readme.kept(1, room) for room in (1, 3)] == [[0], [0, 3, 4]]
