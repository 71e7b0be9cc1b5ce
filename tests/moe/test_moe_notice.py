"""Warnings of the library name the line of whoever called it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from etr.moe import EtrWarning, MoE, MoEConfig


def layer() -> MoE:
    return MoE(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=2, top_k=1))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_warning_is_placed_where_the_caller_is(wrapped: bool) -> None:
    model = nn.Sequential(layer()) if wrapped else layer()
    with pytest.warns(EtrWarning, match="evaluates dropless") as found:
        model.eval()
    assert Path(found[0].filename) == Path(__file__)
    assert "model.eval()" in Path(__file__).read_text().splitlines()[found[0].lineno - 1]


def test_a_place_warns_once_by_default() -> None:
    program = """
import torch
from etr.moe import MoE, MoEConfig
layer = MoE(MoEConfig(hidden_size=8, intermediate_size=8, num_experts=2, top_k=1))
for _ in range(3):
    layer.eval()
layer.eval()
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stderr
    assert said.count("evaluates dropless") == 2
    assert "torch/nn" not in said
