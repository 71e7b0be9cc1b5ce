"""The layer and the shelf of methods need torch alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = (
    *("transformers", "tokenizers", "safetensors", "tyro", "rich", "vl_convert", "scipy"),
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


def test_importing_loads_what_is_used_alone() -> None:
    """Modules are counted, not seconds: by `etr`, by its layer, by a method that is asked for."""
    script = """
import sys
def loaded(since=frozenset()):
    return {name for name in sys.modules if name not in since}

import etr
heavy = ("torch", "numpy", "scipy", "transformers", "pydantic", "tyro", "vl_convert", "pyarrow")
assert not loaded() & {*heavy, "etr.moe", "etr.methods"}, loaded()
assert "MoE" in dir(etr) and "methods" in dir(etr) and not hasattr(etr, "no_such_name")

import torch
before = loaded()
layer = etr.MoE(etr.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4))
layer(torch.randn(8, 16))
new = loaded(before)
assert all(name.startswith(("etr.moe", "etr.field_notes", "torch.")) for name in new), new

before = loaded()
assert etr.ROUTERS["remoe"].__module__ == "etr.methods.remoe"
floors = ("etr.methods", "etr.model", "etr.systems", "etr.moe.")
assert all(name.startswith(floors) for name in loaded(before)), loaded(before)
from etr import *
assert MoE is etr.MoE and etr.methods.METHODS["remoe"].rows[0].kind is ROUTERS["remoe"]
print("counted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "counted\n", done.stderr


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
