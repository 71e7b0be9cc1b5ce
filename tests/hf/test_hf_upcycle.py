"""Dense models to MoE ones: the same function where that can be, and clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import quiet_eval, tokens
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from etr.hf import load_pretrained
from etr.hf.shards import WEIGHTS
from etr.hf.upcycle import DENSE, UpcycleConfig, _expert_stack, upcycle
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
assert set(CONFIGS) == set(DENSE), "every family in the table is tested"


def dense(folder: Path, family: str = "llama", **changes: Any) -> Any:
    """Save a tiny random model; returns it in float64."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": family == "llama",
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**{**sizes, **changes}))
    for name, value in model.named_parameters():  # norms of 1 and biases of 0 prove nothing
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=0.0 if "bias" in name else 1.0, std=0.2)
    model.save_pretrained(folder)
    return model.double().eval()


def logits(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def options(**changes: Any) -> UpcycleConfig:
    return UpcycleConfig(**{"num_experts": 4, **changes})


SAME = {
    "copies": options(),
    "copies, linear": options(router="token_choice", top_k=3),
    "slices": options(experts="slice", top_k=4, router="token_choice"),
}
OTHER = {
    "noise": options(noise=0.1),
    "one copy": options(top_k=1),
    "some slices": options(experts="slice", router="token_choice"),
    "uneven slices": options(experts="slice", top_k=4),
}


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("case", SAME)
def test_the_function_is_kept_where_the_report_says_so(
    case: str, family: str, tmp_path: Path
) -> None:
    x, model = tokens(), dense(tmp_path / "dense", family)
    report = upcycle(tmp_path / "dense", tmp_path / "moe", SAME[case])
    assert report.same_function
    assert not report.reason
    upcycled = quiet_eval(load_pretrained(tmp_path / "moe").double())
    assert torch.allclose(logits(model, x), logits(upcycled, x), atol=1e-9)
    layers = moe_layers(upcycled)
    assert [layer.config.num_experts for layer in layers] == [4, 4]
    # Without training, later tokens come from the cache as they do in one piece.
    out = upcycled.generate(x, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.generate(x, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("router", ["etr", "token_choice"])
def test_a_token_has_the_dense_output_while_one_copy_keeps_it(router: str, tmp_path: Path) -> None:
    """In training too, where half of the choices are dropped."""
    model = dense(tmp_path / "dense")
    half = options(router=router, capacity="factor:capacity_factor=0.5")
    upcycle(tmp_path / "dense", tmp_path / "moe", half)
    layer = moe_layers(load_pretrained(tmp_path / "moe").double())[0].train()
    x = torch.randn(64, 32, dtype=torch.float64)
    y, want = layer(x), model.model.layers[0].mlp(x)
    lost = (y == 0).all(-1)
    assert 0 < int(lost.sum()) < 32, "as many choices as tokens were dropped"
    torch.testing.assert_close(y[~lost], want[~lost])


@pytest.mark.parametrize("case", OTHER)
def test_other_cases_are_said_to_differ_and_do(case: str, tmp_path: Path) -> None:
    x, model = tokens(), dense(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", OTHER[case])
    assert not report.same_function
    assert report.reason
    upcycled = quiet_eval(load_pretrained(tmp_path / "moe").double())
    assert not torch.allclose(logits(model, x), logits(upcycled, x), atol=1e-3)


def test_experts_hold_what_they_should(tmp_path: Path) -> None:
    model = dense(tmp_path / "dense")
    mlp = model.model.layers[1].mlp
    gate, down = mlp.gate_proj.weight.float(), mlp.down_proj.weight.float()
    upcycle(tmp_path / "dense", tmp_path / "slices", options(experts="slice"))
    experts = load_pretrained(tmp_path / "slices").model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape == (4, 24, 32)
    assert torch.equal(experts.gate_up_proj[:, :12].flatten(0, 1), gate)
    assert torch.equal(torch.cat(list(experts.down_proj), 1), down)
    upcycle(tmp_path / "dense", tmp_path / "copies", options(noise=0.5))
    experts = load_pretrained(tmp_path / "copies").model.layers[1].mlp.experts
    assert experts.gate_up_proj.shape == (4, 96, 32)
    apart = (experts.down_proj - down).std(dim=(1, 2)) / down.std()
    assert torch.allclose(apart, torch.full((4,), 0.5), atol=0.05)
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


def test_the_same_seed_gives_the_same_files_however_they_are_cut(tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    for name, size in (("a", 10**9), ("b", 20_000)):
        upcycle(tmp_path / "dense", tmp_path / name, options(noise=0.1), max_shard_bytes=size)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    first, second = load_pretrained(tmp_path / "a"), load_pretrained(tmp_path / "b")
    for (name, mine), theirs in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not torch.equal(first.model.layers[0].mlp.router.weight,
                           first.model.layers[1].mlp.router.weight)  # fmt: skip


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    config = options(noise=0.1)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle(tmp_path / "dense", tmp_path / "moe", config, max_shard_bytes=20_000, progress=stop)
    assert not (tmp_path / "moe").exists()
    shards = (tmp_path / "moe.partial").glob("model-*.safetensors")
    done = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    assert done
    upcycle(tmp_path / "dense", tmp_path / "moe", config, max_shard_bytes=20_000)
    for name, time in done.items():
        assert (tmp_path / "moe" / name).stat().st_mtime_ns == time
    load_pretrained(tmp_path / "moe")


def test_layers_behind_the_last_are_left_out(tmp_path: Path) -> None:
    dense(tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / WEIGHTS)
    extra = {f"model.layers.{n}.mlp.gate_proj.weight": torch.ones(2, 2) for n in (2, 3)}
    save_file({**weights, **extra}, tmp_path / "dense" / WEIGHTS, metadata={"format": "pt"})
    upcycle(tmp_path / "dense", tmp_path / "moe", options())
    assert len(load_pretrained(tmp_path / "moe").model.layers) == 2


def test_what_should_compute_the_same_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense(tmp_path / "dense")
    found = upcycle(tmp_path / "dense", tmp_path / "a", SAME["slices"], compare=True).difference
    assert found is not None
    assert found.largest < 1e-4
    found = upcycle(tmp_path / "dense", tmp_path / "b", OTHER["noise"], compare=True).difference
    assert found is not None
    assert not found.same_function
    stack = _expert_stack
    monkeypatch.setattr("etr.hf.upcycle._expert_stack", lambda *given: stack(*given) * 1.1)
    with pytest.raises(ValueError, match="does not compute the same"):
        upcycle(tmp_path / "dense", tmp_path / "c", SAME["copies"], compare=True)
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_upcycled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        upcycle(tmp_path / "none", tmp_path / "moe", options())
    dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="num_experts=5 must divide intermediate_size=48"):
        upcycle(tmp_path / "dense", tmp_path / "moe", options(num_experts=5, experts="slice"))
    dense(tmp_path / "bias", attention_bias=True)
    with pytest.raises(ValueError, match="attention_bias=True of the llama config"):
        upcycle(tmp_path / "bias", tmp_path / "moe", options())
    upcycle(tmp_path / "dense", tmp_path / "moe", options())
    with pytest.raises(ValueError, match="model_type='etr'; dense families"):
        upcycle(tmp_path / "moe", tmp_path / "again", options())
    with pytest.raises(ValueError, match="exists already"):
        upcycle(tmp_path / "dense", tmp_path / "moe", options())
    with pytest.raises(ValueError, match="top_k=5 must lie between 1 and num_experts=4"):
        options(top_k=5)
    with pytest.raises(ValueError, match="noise=-1 must be >= 0"):
        options(noise=-1)
