"""Experts kept on disk by accelerate's device_map: the same logits, the same routing state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import calibrated, make_model, tokens

from etr.hf import EtrForCausalLM
from etr.moe import MoE, moe_layers
from etr.moe.state import GlobalState

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def device_map(model: torch.nn.Module, offloaded: str) -> dict[str, str]:
    """Modules whose name ends so on disk, everything else on the CPU."""
    found: dict[str, str] = {}

    def place(prefix: str, module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path.endswith(offloaded):
                found[path] = "disk"
            elif any(f"{path}.{below}".endswith(offloaded) for below, _ in child.named_modules()):
                place(f"{path}.", child)
            else:
                found[path] = "cpu"

    place("", model)
    assert "disk" in found.values()
    return found


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Routing state by name."""
    return {
        f"{prefix}.{name}": value
        for prefix, module in model.named_modules()
        if isinstance(module, GlobalState)
        for name, value in module.named_buffers(recurse=False)
    }


@pytest.mark.parametrize("offloaded", [".experts", ".mlp", "layers.1"])
def test_offloaded_experts_compute_the_same(offloaded: str, tmp_path: Path) -> None:
    model = calibrated(make_model("etr"))
    model.save_pretrained(tmp_path / "model")
    loaded: Any = EtrForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map=device_map(model, offloaded),
        offload_folder=tmp_path / "offload",
        dtype=torch.float64,
    )
    loaded.eval()
    on_disk = [layer.experts.down_proj.device.type == "meta" for layer in moe_layers(loaded)]
    assert on_disk == [offloaded != "layers.1", True]

    x = tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=0, atol=1e-12)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(x, **options), model.generate(x, **options))

    before, after = states(model), states(loaded)
    assert set(before) == set(after)
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name
    assert all(layer.has_thresholds() for layer in moe_layers(loaded))


def test_a_device_map_keeps_layers_whole() -> None:
    """`device_map="auto"` must not split a decoder layer over devices."""
    model = make_model("etr")
    layers = {type(layer).__name__ for layer in model.model.layers}
    assert layers <= set(model._no_split_modules)
    assert any(isinstance(m, MoE) for layer in model.model.layers for m in layer.modules())
