"""The page of operations says what layers run, and a count does not grow unseen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operations_tool", ROOT / "tools/operations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["operations_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_layers_run(tool: ModuleType) -> None:
    version, stored = tool.stored(tool.PAGE.read_text(encoding="utf-8"))
    if not torch.__version__.startswith(f"{version}."):
        pytest.skip(f"the page was made with torch {version}, which counts otherwise")
    found = tool.counted()
    assert tool.grown(stored, found) == []
    shared = {name: found.get(name) for name in stored}  # the page may wait for new routers
    assert shared == stored, "run `python tools/operations.py`"


def test_the_tool_refuses_growth(tool: ModuleType) -> None:
    row = {mode: [3, None] for mode in tool.MODES}
    more = {**row, "forward": [4, 7]}
    assert tool.grown({"a": more}, {"a": row, "b": row}) == []
    assert tool.grown({"a": row}, {"a": more}) == ["a, forward, top-1: 3 before, 4 now"]
    _, read = tool.stored(tool.page({"a": more}))
    assert read == {"a": more}


def test_views_do_not_count_and_all_else_does(tool: ModuleType) -> None:
    x = torch.ones(4, 2)
    assert tool.operations(lambda: x.T[0].view(-1).add_(1)) == ["aten.add_.Tensor"]
