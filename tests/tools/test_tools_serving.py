"""The page of serving is what was measured, and what it is made of counts right."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import MixtralConfig

from etr.files import read_json
from etr.hf import EtrConfig, EtrForCausalLM
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


def test_ratios_are_of_a_round(tool: ModuleType) -> None:
    """A step that takes twice as long as the first one in each of two rounds has a ratio of 2."""
    clock = iter([0, 0, 0, 1, 1, 3, 0, 4, 4, 12])  # a round that warms up, and two
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.times.time, "process_time", lambda: next(clock))
        found = tool.times.medians({"one": lambda: None, "two": lambda: None}, 2)
    assert found == {"one": 1, "two": 2}


def test_decodings_and_policies_are_timed_on_the_same_model(tool: ModuleType) -> None:
    """Plain decoding is the model's own: its loss is that of the second halves, by hand."""
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    config = EtrConfig.from_base(base, "token_choice", capacity="none", eval_selection="dropless")
    model, rows = EtrForCausalLM(config).eval(), torch.randint(32, (3, 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.times.medians, "__defaults__", (1,))
        found = tool.times.of_decodings(model, tool.DECODINGS, rows)
        taken = tool.times.of_policies(model, tool.POLICIES, rows)
    assert set(taken) == set(tool.POLICIES)
    assert taken["dropless"] == [1, 1]
    logits = model(rows).logits[:, 6:-1].detach()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 7:].flatten())
    assert found["plain"]["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert found["plain"]["guessed"] == float((logits.argmax(-1) == rows[:, 7:]).float().mean())
    assert all(0 <= row["guessed"] <= 1 for row in found.values())
    assert "loss" in found["rewire:rate=0.3"]
    assert found["rewire:rate=0.3"]["loss"] != found["plain"]["loss"]
