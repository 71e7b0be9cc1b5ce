"""The layer and the shelf of methods need torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = (
    *("transformers", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "scipy"),
    "numpy",
)
FLOORS = {"etr.moe", "etr.table", "etr.field_notes", "etr.methods", "etr.model", "etr.systems"}
WINGS = ("etr.systems", "etr.model")
"""Packages beside the layer that need torch alone too."""


def test_the_layer_imports_and_runs_without_any_extra() -> None:
    """With every extra made unimportable, a layer trains and evaluates."""
    script = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None
import torch, etr
layer = etr.MoE(etr.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4))
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
etr.attach(layer, optimizer, total_steps=2)
for _ in range(2):
    output = layer(torch.randn(8, 16))
    (output.hidden_states.sum() + sum(output.losses.values())).backward()
    optimizer.step()
layer.eval()
layer(torch.randn(8, 16))
loaded = {{".".join(name.split(".")[:2]) for name in sys.modules if name.startswith("etr.")}}
assert loaded <= {FLOORS!r}, loaded
print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ran\n"


@pytest.mark.parametrize("package", WINGS)
def test_what_stands_beside_the_layer_imports_without_any_extra(package: str) -> None:
    script = f"""
import sys
for name in {(*EXTRAS, "numpy", "pyarrow")!r}:
    sys.modules[name] = None
import {package}
print("imported")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "imported\n", done.stderr
