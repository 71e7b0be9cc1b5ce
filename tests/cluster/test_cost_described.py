"""Descriptions of models and clusters: what comes with the library, and what is wrong in a file."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from etr.cluster.cost import Cluster, Layout, ModelShape, RoutingShape, known, read_described

QWEN = {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("name", "family", "layers", "options"),
    [("mixtral-8x7b", "Mixtral", 2, {}), ("qwen3-30b-a3b", "Qwen3Moe", 2, QWEN),
     ("deepseek-v3", "DeepseekV3", 4, {})],
)  # fmt: skip
def test_parameters_are_those_of_the_model(name, family, layers, options):
    """The first layers, since the others are like the last of them."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**{**options, "num_hidden_layers": layers})
    with torch.device("meta"):
        made = getattr(transformers, f"{family}ForCausalLM")._from_config(config)
    count = sum(parameter.numel() for parameter in made.parameters())
    shape = dataclasses.replace(read_described(ModelShape, name), num_layers=layers)
    assert shape.num_parameters == count


def test_parameters_of_whole_models():
    found = {name: read_described(ModelShape, name).num_parameters for name in known(ModelShape)}
    assert found["mixtral-8x7b"] == 46_702_792_704
    assert found["deepseek-v3"] / 1e9 == pytest.approx(671, abs=0.5)
    assert found["qwen3-30b-a3b"] / 1e9 == pytest.approx(30.5, abs=0.05)


@pytest.mark.parametrize("kind", [ModelShape, Cluster])
def test_all_that_come_with_the_library_can_be_read(kind):
    assert known(kind)
    for name in known(kind):
        assert isinstance(read_described(kind, name), kind)


CLUSTER = {
    "name": "mine",
    "num_nodes": 2,
    "devices_per_node": 4,
    "device": {"flops_per_second": 1e14, "memory_bytes": 8e10, "memory_bytes_per_second": 2e12},
    "links": {
        "latency_seconds": 1e-5,
        "within_bytes_per_second": 1e11,
        "between_bytes_per_second": 1e10,
    },
}
TOML = """
name = "mine"
num_nodes = 2
devices_per_node = 4
[device]
flops_per_second = 1e14
memory_bytes = 8e10
memory_bytes_per_second = 2e12
[links]
latency_seconds = 1e-5
within_bytes_per_second = 1e11
between_bytes_per_second = 1e10
"""


def test_json_and_toml_say_the_same(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(CLUSTER))
    (tmp_path / "a.toml").write_text(TOML)
    found = read_described(Cluster, tmp_path / "a.json")
    assert found == read_described(Cluster, tmp_path / "a.toml")
    assert found.num_devices == 8


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("device", "memory_bytes", "80GB", "memory_bytes='80GB' must be bytes"),
        ("device", "memory_bytes", None, "memory_bytes is missing (bytes)"),
        ("device", "flops_per_second", 0.0, "floating-point operations per second"),
        ("device", "efficiency", [[1e9, 2.0]], "efficiency"),
        ("device", "efficiency", 3, "efficiency=3 must be a list"),
        ("links", "latency_seconds", -1, "latency_seconds=-1.0 must be at least 0, in seconds"),
        ("links", "between_bytes_per_second", 0, "must be positive, in bytes per second"),
        ("links", "latency_ms", 1, "'latency_ms' is not a key; the keys are latency_seconds"),
        ("", "num_nodes", 1.5, "num_nodes=1.5 must be a whole number"),
        ("", "num_nodes", 0, "num_nodes=0 must be a whole number of at least 1"),
        ("", "device", 5, "device must be a table of keys"),
    ],
)
def test_what_is_wrong_is_named_with_its_unit(tmp_path, part, key, value, said):
    values = json.loads(json.dumps(CLUSTER))
    inner = values[part] if part else values
    inner[key] = value
    if value is None:
        del inner[key]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"^bad\.json") as error:
        read_described(Cluster, path)
    assert said in str(error.value)


def test_files_that_are_not_there_or_not_readable(tmp_path):
    with pytest.raises(FileNotFoundError, match="mixtral-8x7b"):
        read_described(ModelShape, "mixtral")
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        read_described(ModelShape, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ValueError, match=r"bad\.toml cannot be read"):
        read_described(ModelShape, tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dispatch": "all_to_all_padded"}, "capacity must be given"),
        ({"capacity": ((1.0, 0.5), (0.0, 1.0))}, "capacity="),
        ({"kept_share": ((0.0, 1.5),)}, "shares between 0 and 1"),
        ({"local_share": 1.5}, "local_share=1.5 must be a share between 0 and 1"),
        ({"load": (0.0, 0.0)}, "load="),
        ({"dispatch": "pigeons"}, "pigeons"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"top_k": True}, "top_k=True must be an integer, or None"),
        ({"local_share": float("nan")}, "local_share=nan must be a number, in a share"),
    ],
)
def test_a_routing_is_checked(values, said):
    with pytest.raises(ValueError, match=said):
        RoutingShape(name="x", **values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"expert": 3}, "num_experts=8"),
        ({"pipeline": 64}, "pipeline=64"),
        ({"data": 64}, "takes 64 devices"),
    ],
)
def test_a_layout_is_checked(values, said):
    model, cluster = read_described(ModelShape, "mixtral-8x7b"), read_described(Cluster, "h100")
    values = {"data": 3, **values} if "expert" in values else values
    with pytest.raises(ValueError, match=said):
        Layout(**values).check(model, cluster)
    with pytest.raises(ValueError, match="must divide"):
        Layout(data=4, expert=3)
