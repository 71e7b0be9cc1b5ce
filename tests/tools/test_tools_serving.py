"""The page of serving is what was measured, and what it is made of counts right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from etr.files import read_json
from etr.systems import Demand

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serving_tool", ROOT / "tools/serving.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_was_measured(tool: ModuleType) -> None:
    found = read_json(tool.RECORD)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(found), (
        "run `python tools/serving.py`"
    )
    for size, bound in found["memory"]["oracle"].items():
        assert all(row[size] <= bound for row in found["memory"].values())


def test_blocks_and_planners(tool: ModuleType) -> None:
    choices = torch.zeros(2, 40, 2, dtype=torch.int64)
    choices[:, :, 1] = torch.arange(40) % 2 + 1
    choices[1, 32:, 1] = -1
    assert tool.used_in_blocks(choices) == (3 + 3 + 3 + 1) / 4
    demand = Demand.of(choices % 8, torch.arange(40) // 8, 8)
    found = tool.placements(demand, demand)
    assert set(found) == set(tool.PLANNERS)
    assert found["exflow"][0] <= found["consecutive"][0]


def test_memories_predict_one_trace_from_another(tool: ModuleType) -> None:
    """Every policy at every size; those who load misses alone stay under the bound."""
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(8, (2, 2, 40, 1), generator=generator)
    sequence, tokens = torch.arange(40) // 8, torch.arange(40) % 5
    seen, held_out = (Demand.of(one, sequence, 8) for one in choices)
    found = tool.memories((seen, tokens), (held_out, tokens))
    assert set(found) == set(tool.CACHES)
    for size in ("1", "2", "4"):
        assert all(0 <= row[size] <= found["oracle"][size] for row in found.values())
