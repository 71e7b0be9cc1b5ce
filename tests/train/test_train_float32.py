"""Checkpoints of 16 bits train in float32 on every path, and small steps are not rounded away.

At 2e-5 a step of AdamW is less than half the distance of most neighbours in bf16: trained in bf16,
12,652 of the 50,082 values below move in five steps of `etr sft`.
"""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_recover import config as recover_config
from test_train_recover import mixtral
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from etr.cli import main
from etr.data import DataConfig, OpenedData, TokenLoader, byte_tokenizer
from etr.evaluate import calibrate
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.hf.swap_router import swap_router
from etr.hf.upcycle import UpcycleConfig, upcycle
from etr.moe import moe_layers
from etr.train.config import OptimizerConfig
from etr.train.into_fixed import train_on
from etr.train.model import widen_weights
from etr.train.recover import recover
from etr.train.sft import SftConfig, sft

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
HALVES = [torch.bfloat16, torch.float16]
RIGHT = 42_466
"""Values that move in float32: all but the embeddings of the 238 bytes that the talks lack."""


def tiny() -> EtrForCausalLM:
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return EtrForCausalLM(EtrConfig.from_base(base))


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().float().clone() for name, value in model.named_parameters()}


def moved(before: dict[str, Tensor], model: nn.Module) -> int:
    after = copies(model)
    return sum(int((after[name] != value).sum()) for name, value in before.items())


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    path = tmp_path / "talks.jsonl"
    rows = [{"prompt": f"say {n}", "completion": "ok " * (1 + n % 3)} for n in range(16)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def sft_config(talks: Path, out: Path, **changes: object) -> SftConfig:
    return SftConfig(
        data=str(talks),
        out=str(out),
        steps=5,
        batch_size=4,
        warmup_steps=0,
        use_cpu=True,
        **changes,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_sft_moves_every_value_that_was_used(dtype: torch.dtype, talks: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra sft")
    model = tiny().to(dtype)
    before = copies(model)
    assert sum(value.numel() for value in before.values()) == 50_082
    result = sft(model, byte_tokenizer(), sft_config(talks, talks.with_name("out")))
    assert model.dtype == torch.float32
    assert abs(moved(before, model) - RIGHT) <= 5
    saved = load_pretrained(result.out)
    assert saved.dtype == torch.float32
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in saved.named_parameters())


def test_adapters_move_every_value_that_they_reach(talks: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra sft")
    pytest.importorskip("peft", reason="needs the extra peft")
    model = tiny().bfloat16()
    before = copies(model)
    options = sft_config(talks, talks.with_name("out"), lora_rank=2, learning_rate=2e-4)
    saved = load_pretrained(sft(model, byte_tokenizer(), options).out)
    reached = {n: v for n, v in before.items() if "experts" in n or "_proj" in n}
    assert moved(reached, saved) > 0.99 * sum(value.numel() for value in reached.values())
    assert moved(before, saved) == moved(reached, saved)


def test_sft_from_the_command_line_and_saved_as_it_came(
    talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="needs the extra sft")
    calibrated: list[torch.dtype] = []

    def seen(model: Any, *args: Any, **options: Any) -> Any:
        calibrated.append(next(model.parameters()).dtype)
        return calibrate(model, *args, **options)

    monkeypatch.setattr("etr.train.sft.calibrate", seen)
    source = talks.with_name("source")
    tiny().bfloat16().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    before = copies(load_pretrained(source))
    options = ["--data", str(talks), "--steps", "5", "--batch-size", "4", "--warmup-steps", "0"]
    options += ["--use-cpu", "--out"]
    wide, narrow = talks.with_name("wide"), talks.with_name("narrow")
    assert main(["sft", str(source), *options, str(wide)]) == 0
    assert main(["sft", str(source), *options, str(narrow), "--save-dtype", "checkpoint"]) == 0
    trained, rounded = load_pretrained(wide), load_pretrained(narrow)
    assert abs(moved(before, trained) - RIGHT) <= 5
    assert 0.4 * RIGHT < moved(before, rounded) < 0.6 * RIGHT, "about half, as the guide says"
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    assert rounded.dtype == torch.bfloat16
    for name, value in rounded.named_parameters():
        assert torch.equal(value, trained.get_parameter(name).bfloat16()), name
    for one, other in zip(moe_layers(trained), moe_layers(rounded), strict=True):
        for name, value in one.calibration.state_dict().items():
            kept = other.calibration.state_dict()[name]
            assert kept.dtype == value.dtype
            assert kept.shape == value.shape
    assert calibrated == [torch.float32, torch.bfloat16], "thresholds of what is saved"


@pytest.mark.parametrize(
    ("field", "value"), [("save_dtype", "bfloat16"), ("precision", "fp16"), ("precision", "bf-16")]
)
def test_names_of_data_types_are_checked(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='{value}' must be one of"):
        SftConfig(data="a", **{field: value})  # type: ignore[arg-type]


def test_recovery_moves_every_value_of_the_routers(
    data: OpenedData, data_config: DataConfig
) -> None:
    models = []
    for steps in (0, 5):
        model = mixtral().bfloat16()
        before = copies(model)
        recover(model, data, recover_config(data_config, steps=steps, learning_rate=1e-5))
        models.append(model)
    start, trained = map(copies, models)
    routers = {name for name in trained if ".router." in name}
    assert all(torch.equal(trained[n], before[n]) for n in before if n not in routers)
    values = {name: start[name] for name in routers}
    assert moved(values, models[1]) >= sum(value.numel() for value in values.values()) - 2
    assert models[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("to_blocks", [False, True])
def test_the_way_into_the_fixed_frame_moves_every_value(
    dtype: torch.dtype, to_blocks: bool, data: OpenedData
) -> None:
    batches = list(islice(TokenLoader(data.dataset, sequence_length=32, batch_size=4), 5))
    model = mixtral().to(dtype)
    swap_router(model, [{"input_ids": batches[0].input_ids}])
    wide = copy.deepcopy(model).float()
    before = copies(model)
    options = OptimizerConfig(learning_rate=1e-5, warmup_steps=0, weight_decay=0.0)
    counts = []
    for each in (model, wide):
        train_on(each, batches, options, to_blocks=to_blocks)
        counts.append(moved(before, each))
    bytes_seen = len({int(token) for batch in batches for token in batch.input_ids.flatten()})
    unseen = (264 - bytes_seen) * 32
    directions = 0 if to_blocks else sum(layer.router.weight.numel() for layer in moe_layers(model))
    total = sum(value.numel() for value in before.values())
    assert counts[0] == pytest.approx(total - unseen - directions, rel=1e-3)
    assert counts[0] == pytest.approx(counts[1], abs=5)
    assert model.dtype == torch.float32


def test_finetune_from_the_command_line(data_config: DataConfig, tmp_path: Path) -> None:
    source = tmp_path / "kept"
    mixtral().bfloat16().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    options = (
        f"--recover --steps 2 --data {data_config.data[0]} --cache-dir {data_config.cache_dir} "
        "--sequence-length 32 --batch-size 4 --calibration-batches 2 --eval-tokens-per-domain 64"
    ).split()
    wide, narrow = str(tmp_path / "wide"), str(tmp_path / "narrow")
    assert main(["finetune", str(source), *options, "--out", wide]) == 0
    more = ["--out", narrow, "--save-dtype", "checkpoint"]
    assert main(["finetune", str(source), *options, *more]) == 0
    trained, rounded = load_pretrained(wide), load_pretrained(narrow)
    assert (trained.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    for name, value in rounded.named_parameters():
        assert torch.equal(value, trained.get_parameter(name).bfloat16()), name
    states = [layer.calibration.state_dict() for layer in moe_layers(rounded)]
    assert all(
        v.dtype == torch.float32 for s in states for v in s.values() if v.is_floating_point()
    )


def test_an_upcycled_model_trains_in_float32(talks: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra sft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48}
    dense = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=2, num_hidden_layers=2, **sizes)
    ).bfloat16()
    dense.save_pretrained(talks.with_name("dense"))
    byte_tokenizer().save_pretrained(talks.with_name("dense"))
    upcycle(talks.with_name("dense"), talks.with_name("moe"), UpcycleConfig(num_experts=4))
    model = load_pretrained(talks.with_name("moe"))
    assert model.dtype == torch.bfloat16
    before = copies(model)
    sft(model, byte_tokenizer(), sft_config(talks, talks.with_name("out")))
    embedded = model.get_input_embeddings().weight.detach() != before["model.embed_tokens.weight"]
    unseen = int((~embedded.any(1)).sum()) * 32
    total = sum(value.numel() for value in before.values())
    assert 200 * 32 < unseen < 250 * 32
    assert moved(before, model) >= 0.999 * (total - unseen)


def test_wider_weights_and_routing_state_stay() -> None:
    model = tiny().double()
    assert widen_weights(model) == torch.float64
    assert model.dtype == torch.float64
    model = tiny().bfloat16()
    layer = moe_layers(model)[0]
    thresholds = {name: value.clone() for name, value in layer.calibration.state_dict().items()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert widen_weights(model) == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for name, value in layer.calibration.state_dict().items():
        assert torch.equal(value, thresholds[name])
        assert value.dtype == thresholds[name].dtype
