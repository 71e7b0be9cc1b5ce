"""`convert`: round trips, layouts on disk, what is refused, interruptions, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import base_config, calibrated, family_model, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM, convert, load_pretrained
from etr.hf.convert import LogitsDifference, logits_difference, write_model
from etr.hf.layouts import LAYOUTS, Layout
from etr.hf.shard_writer import MARKER
from etr.hf.shards import WEIGHTS, ShardReader
from etr.moe import moe_layers
from etr.moe.capacity import Factor

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def save(folder: Path, family: str = "mixtral", dtype: Any = None, **options: Any) -> Path:
    """A folder that transformers wrote."""
    torch.manual_seed(0)
    model = family_model(family)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, **options)
    return folder


def same_tensors(first: Path, second: Path) -> None:
    a, b = ShardReader(first), ShardReader(second)
    assert sorted(a.keys()) == sorted(b.keys())
    for key in a.keys():  # noqa: SIM118
        assert a.dtype(key) == b.dtype(key)
        assert torch.equal(a.tensor(key), b.tensor(key)), key


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    save(tmp_path / "a", family, torch.bfloat16, max_shard_size="30KB")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    done: list[tuple[int, int]] = []
    there = convert(
        tmp_path / "a",
        tmp_path / "b",
        max_shard_bytes=20_000,
        progress=lambda *sizes: done.append(sizes),
    )
    back = convert(tmp_path / "b", tmp_path / "c", max_shard_bytes=25_000)
    assert (there.family, there.to, back.to) == (family, "etr", "hf")
    assert done[-1] == (there.num_bytes, there.num_bytes)
    same_tensors(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "{}"
    before, after = (AutoConfig.from_pretrained(tmp_path / x).to_dict() for x in "ac")
    for values in (before, after):
        values.pop("_name_or_path")
    assert after == before
    for folder in ("b", "c"):
        assert len(list((tmp_path / folder).glob("model-*.safetensors"))) > 1


def test_routing_state_stays_exact_in_a_bfloat16_model(tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        save(tmp_path / "a", "deepseek_v3"), dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    for model in (
        load_pretrained(tmp_path / "c"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.bfloat16),
    ):
        found = moe_layers(model)[1].router.selection.bias
        assert found.dtype == torch.float32
        assert torch.equal(found, bias)
        assert moe_layers(model)[1].experts.down_proj.dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_as_transformers_holds_them_in_memory_are_read_too(
    family: str, tmp_path: Path
) -> None:
    convert(save(tmp_path / "a", family), tmp_path / "x")
    convert(save(tmp_path / "b", family, save_original_format=False), tmp_path / "y")
    same_tensors(tmp_path / "x", tmp_path / "y")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("parts", [1, 2])
def test_layouts_undo_themselves(name: str, parts: int) -> None:
    num_experts = 1 if name == "one" else 3
    shape = (num_experts, 8) if name == "pairs" else (num_experts, 8, 5)
    ours = torch.arange(torch.Size(shape).numel()).reshape(shape)
    pieces = LAYOUTS[name].split(ours, parts)
    assert torch.equal(LAYOUTS[name].join(pieces, parts), ours)
    assert sum(piece.numel() for piece in pieces) == ours.numel()


def test_a_fresh_process_needs_the_import_alone(tmp_path: Path) -> None:
    convert(save(tmp_path / "a"), tmp_path / "b")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert isinstance(model, EtrForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "b"), EtrConfig)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architectures"] == ["EtrForCausalLM"]
    found = logits_difference(tmp_path / "a", tmp_path / "b")
    assert found.median <= found.largest < 1e-5 < found.logit


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_behind_the_last_are_left_out_by_name(family: str, tmp_path: Path) -> None:
    """Several that predict further tokens, as DeepSeek-V3's; transformers loads none of them."""
    folder = save(tmp_path / "a", family)
    weights = load_file(folder / WEIGHTS)
    extra = {
        f"model.layers.{number}.{name}": torch.ones(32)
        for number in (2, 3, 11)
        for name in ("enorm.weight", "mlp.experts.0.gate_proj.weight", "shared_head.norm.weight")
    }
    save_file({**weights, **extra}, folder / WEIGHTS, metadata={"format": "pt"})
    report = convert(folder, tmp_path / "b", compare=True)
    assert set(report.ignored) == set(extra)
    assert report.difference is not None
    assert report.difference.largest < 1e-5
    save_file({**weights, "model.layers.1.extra": torch.ones(2)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"1 unknown tensors: model\.layers\.1\.extra"):
        convert(folder, tmp_path / "c")


def test_a_conversion_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of it; without the comparison it is kept."""
    source = save(tmp_path / "a")
    whole = convert(source, tmp_path / "b", compare=True).difference
    assert whole is not None
    assert whole.same_function
    right = LAYOUTS["experts"]
    wrong = Layout(join=lambda *given: right.join(*given) * 1.1, split=right.split)
    monkeypatch.setitem(LAYOUTS, "experts", wrong)
    with pytest.raises(ValueError, match=r"does not compute the same: logits differ by at most"):
        convert(source, tmp_path / "c", compare=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    convert(source, tmp_path / "c")
    assert not logits_difference(source, tmp_path / "c").same_function


@pytest.mark.parametrize(
    ("median", "logit", "same"),
    [(0.0, 0.0, True), (9e-4, 1.0, True), (2e-3, 1.0, False), (float("nan"), 1.0, False)],
)
def test_what_counts_as_rounding(median: float, logit: float, same: bool) -> None:
    difference = LogitsDifference(largest=1.0, median=median, logit=logit)
    assert difference.same_function is same


def test_thresholds_do_not_count_as_a_difference(tmp_path: Path) -> None:
    """They stay behind when a model goes back to its family; both are compared dropless."""
    model = calibrated(make_model("token_choice", capacity=Factor(capacity_factor=0.5)))
    assert any(bool((m.calibration.threshold > -torch.inf).any()) for m in moe_layers(model))
    model.float().save_pretrained(tmp_path / "a")
    report = convert(tmp_path / "a", tmp_path / "b", to="hf", compare=True)
    assert report.difference is not None
    assert report.difference.largest < 1e-5


def test_an_interrupted_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["etr.hf.convert"], "load_causal", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "b", compare=True)
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.partial" / MARKER).is_file()
    convert(source, tmp_path / "b", compare=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the tensors of a folder with one file."""

    def apply(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return apply


def test_an_interrupted_conversion_is_marked_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = save(tmp_path / "a"), tmp_path / "b"
    whole = tmp_path / "whole"
    convert(source, whole, max_shard_bytes=20_000)
    read: list[str] = []
    original = ShardReader.tensor

    def tensor(self: ShardReader, key: str) -> torch.Tensor:
        read.append(key)
        if len(read) == stop:
            raise KeyboardInterrupt
        return original(self, key)

    monkeypatch.setattr(ShardReader, "tensor", tensor)
    stop = 25
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, max_shard_bytes=20_000)
    partial = tmp_path / "b.partial"
    assert not target.exists()
    assert (partial / MARKER).is_file()
    assert not (partial / "config.json").exists()
    assert len(list(partial.glob("model-*.safetensors"))) >= 1
    stop, finished = -1, set(read[:-1])
    read.clear()
    convert(source, target, max_shard_bytes=20_000)
    assert len(read) < len(ShardReader(source).keys())
    assert not finished <= set(read)  # what was complete was not made again
    assert not partial.exists()
    same_tensors(target, whole)


def test_a_partial_folder_of_another_source_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a")
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", _fail_at(3))
        with pytest.raises(OSError, match="no space"):
            convert(source, tmp_path / "b", max_shard_bytes=20_000)
    rewrite(lambda w: w.update({"lm_head.weight": w["lm_head.weight"] + 1}))(source)
    convert(source, tmp_path / "b", max_shard_bytes=20_000)
    convert(source, tmp_path / "c", max_shard_bytes=20_000)
    same_tensors(tmp_path / "b", tmp_path / "c")


def _fail_at(count: int) -> Callable[..., None]:
    import os

    calls, replace = [0], os.replace

    def apply(*paths: Any) -> None:
        calls[0] += 1
        if calls[0] == count:
            raise OSError("no space left")
        replace(*paths)

    return apply


MEMORY = """
import resource, sys
from transformers import AutoConfig
from etr.hf import EtrConfig, convert
from etr.hf.matching import skeleton
first, second, third, shard = sys.argv[1:]
skeleton(EtrConfig.from_base(AutoConfig.from_pretrained(first), "keep"))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
convert(first, second, max_shard_bytes=int(shard))
convert(second, third, max_shard_bytes=int(shard))
print(peak() - before)
"""


def test_memory_is_bounded_by_a_shard_and_a_layer(tmp_path: Path) -> None:
    """There and back, of a model of 12 layers and 24 shards."""
    config = base_config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_local_experts=8
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "a", max_shard_size="6MB")
    layer = 4 * 8 * 3 * 256 * 512
    shard, total = layer // 2, 12 * layer
    arguments = [str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c"), str(shard)]
    command = [sys.executable, "-c", MEMORY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < shard + layer + 16 * 2**20 < total / 2
    same_tensors(tmp_path / "a", tmp_path / "c")


def test_a_loaded_model_is_written_whole(tmp_path: Path) -> None:
    convert(save(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "b")
    model = load_pretrained(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    write_model(model, tmp_path / "c", tmp_path / "b")
    same_tensors(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c" / "tokenizer.json").is_file()
    assert load_pretrained(tmp_path / "c").dtype == torch.bfloat16
