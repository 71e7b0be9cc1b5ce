"""What `convert` refuses, and that it leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf_convert import rewrite, save
from tiny_models import make_model, quiet_eval

from etr.hf import convert
from etr.hf.shards import INDEX, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def config_value(**values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Change the index of a folder with shards."""

    def apply(folder: Path) -> None:
        values = json.loads((folder / INDEX).read_text())
        change(values["weight_map"])
        (folder / INDEX).write_text(json.dumps(values))

    return apply


def _move(weight_map: dict[str, str]) -> None:
    first = min(weight_map)
    weight_map[first] = next(x for x in weight_map.values() if x != weight_map[first])


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
BAD: dict[str, tuple[dict[str, Any], Callable[[Path], Any], type[Exception], str]] = {
    "no config": (
        {},
        lambda f: (f / "config.json").unlink(),
        FileNotFoundError,
        r"holds no config\.json",
    ),
    "config is not JSON": (
        {},
        lambda f: (f / "config.json").write_text("{"),
        ValueError,
        r"config\.json is not complete JSON",
    ),
    "unknown family": (
        {},
        config_value(model_type="llama"),
        ValueError,
        r"'llama', which is not a known family; choose one of mixtral",
    ),
    "no weights": (
        {},
        lambda f: (f / WEIGHTS).unlink(),
        FileNotFoundError,
        r"neither model\.safetensors nor",
    ),
    "damaged": ({}, _truncate, ValueError, r"model\.safetensors is damaged"),
    "missing shard": (
        {"max_shard_size": "30KB"},
        lambda f: min(f.glob("model-*.safetensors")).unlink(),
        FileNotFoundError,
        r"shard model-00001.* is missing",
    ),
    "wrong index": (
        {"max_shard_size": "30KB"},
        index(_move),
        ValueError,
        r"is wrong about 1 tensors: it places .* and it stands in",
    ),
    "index leaves one out": (
        {"max_shard_size": "30KB"},
        index(lambda m: m.pop(min(m))),
        ValueError,
        r"is wrong about 1 tensors: it places .* in None",
    ),
    "path upwards": (
        {"max_shard_size": "30KB"},
        index(lambda m: m.update({min(m): "../model.safetensors"})),
        ValueError,
        r"'\.\./model\.safetensors', which is not the name of a file in its folder",
    ),
    "absolute path": (
        {"max_shard_size": "30KB"},
        index(lambda m: m.update({min(m): "/etc/passwd"})),
        ValueError,
        r"'/etc/passwd', which is not the name",
    ),
    "dtype mismatch": (
        {},
        rewrite(lambda w: w.update({EXPERT: w[EXPERT].bfloat16()})),
        ValueError,
        r"differ in dtype: .*experts\.2\.w1\.weight' is torch\.bfloat16",
    ),
    "quantised": (
        {},
        rewrite(lambda w: w.update({EXPERT: w[EXPERT].to(torch.uint8)})),
        ValueError,
        r"has dtype U8; readable are F64.*dequantised",
    ),
    "unknown tensor": (
        {},
        rewrite(lambda w: w.update({"model.extra.weight": torch.ones(2)})),
        ValueError,
        r"1 unknown tensors: model\.extra\.weight",
    ),
    "missing tensor": (
        {},
        rewrite(lambda w: w.pop(EXPERT)),
        ValueError,
        r"1 missing tensors: .*experts\.2\.w1\.weight",
    ),
    "other shape": (
        {},
        rewrite(lambda w: w.update({EXPERT: torch.ones(3, 32)})),
        ValueError,
        r"has shape \(3, 32\); its config\.json asks for \(48, 32\)",
    ),
    "other activation": (
        {},
        config_value(hidden_act="relu"),
        ValueError,
        r"hidden_act='relu'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    options, spoil, error, message = BAD[name]
    folder = save(tmp_path / "a", **options)
    spoil(folder)
    with pytest.raises(error, match=message):
        convert(folder, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "b")
    with pytest.raises(ValueError, match=r"to='hf'.*model_type='mixtral' already"):
        convert(folder, tmp_path / "b", to="hf")
    with pytest.raises(ValueError, match="exists already"):
        convert(folder, folder)
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be at least 1"):
        convert(folder, tmp_path / "b", max_shard_bytes=0)
    (tmp_path / "b.partial").mkdir()
    with pytest.raises(ValueError, match=r"b\.partial' is in the way"):
        convert(folder, tmp_path / "b")


def test_another_router_has_no_way_back(tmp_path: Path) -> None:
    quiet_eval(make_model("etr")).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"mixtral cannot hold this model: router is 'etr'"):
        convert(tmp_path / "a", tmp_path / "b")
