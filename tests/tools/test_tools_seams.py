"""The table of seams on the architecture page is that of the tables."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def seams() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seams_tool", ROOT / "tools/seams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["seams_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_tables_make(seams: ModuleType) -> None:
    text = seams.PAGE.read_text(encoding="utf-8")
    assert seams.renewed(text) == text, "run `python tools/seams.py`"


def test_every_place_exists(seams: ModuleType) -> None:
    for seam in seams.SEAMS:
        assert (ROOT / "src/etr" / seam.place).exists(), seam.place


def test_a_new_row_shows(seams: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from etr.moe import ROUTERS

    monkeypatch.setattr(seams, "MOST", len(ROUTERS) + 1)
    monkeypatch.setitem(ROUTERS, "of_a_test", ROUTERS["hash"])
    assert "`of_a_test`" in seams.seams_table()
