"""The tool that measures transforms: a few of them on a tiny model, and its page."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.files import write_json
from etr.model import TRANSFORMS

ROOT = Path(__file__).resolve().parents[2]
SOME = (
    "flexmore:rank=99",
    "quantmoe:average=2.5",
    "compressed_experts:main=1",
    "easy_ep:keep=0.25",
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transforms_tool", ROOT / "tools/transforms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["transforms_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_every_method_is_a_transform_with_these_options(tool: ModuleType) -> None:
    assert len(set(tool.METHODS)) == len(tool.METHODS)
    for text in tool.METHODS:
        TRANSFORMS.parse(text)


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_a_tiny_model_is_measured_and_has_its_page(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full rank nothing changes; one choice of two is half the work; a method that cannot be
    carried out is a line of the page."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=BYTE_VOCAB_SIZE, **sizes, **heads))
    model.save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    (tmp_path / "text").mkdir()
    for number in range(40):
        text = " ".join(str((number * 7919 + i * i) % 1000) for i in range(100))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    settings = tool.Settings(
        calibrate=(str(tmp_path / "text"),),
        sequence_length=32,
        batch_size=4,
        num_batches=2,
        max_tokens_per_domain=256,
        cache_dir=str(tmp_path / "cache"),
    )
    found = tool.measure(str(tmp_path / "tiny"), settings, SOME)
    whole, bits, half, refused = (found["methods"][name] for name in SOME)
    assert (whole["difference"], whole["bytes"], whole["flops"]) == (0.0, 1.0, 1.0)
    assert bits["flops"] == 1.0
    assert bits["bytes"] < 0.9
    assert half["flops"] == 0.5
    assert half["loss"] == pytest.approx(found["loss"] + half["difference"])
    assert "top_k=2" in refused["refused"]
    monkeypatch.setattr(tool, "RECORD", tmp_path / "transforms.json")
    monkeypatch.setattr(tool, "PAGE", tmp_path / "transforms.md")
    write_json(tool.RECORD, {"tiny": found})
    tool.main([])
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.page({"tiny": found})
    assert all(f"`{name}`" in page for name in SOME)
    assert f"- `{SOME[3]}` is refused: {refused['refused']}" in page
