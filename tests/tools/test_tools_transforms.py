"""The tool that measures transforms: some on a tiny model, their controls, and its page."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.files import read_json
from etr.model import TRANSFORMS

ROOT = Path(__file__).resolve().parents[2]
SOME = (
    "flexmore:rank=99",
    "compressed_experts:main=1",
    "easy_ep:keep=0.25",
    "easy_ep:keep=0.5",
)
SIZES = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("transforms_tool", ROOT / "tools/transforms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["transforms_tool"] = module
    sys.path.insert(0, str(ROOT / "tools"))
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "tools"))
    yield module
    for name in ("transforms_tool", "transform_models", "transform_controls"):
        del sys.modules[name]


def test_every_method_is_a_transform_with_these_options(tool: Any) -> None:
    for subject in tool.MODELS.values():
        assert len(set(subject.methods)) == len(subject.methods)
        for text in subject.methods:
            TRANSFORMS.parse(text)


def test_the_page_is_what_was_measured(tool: Any) -> None:
    if not tool.RECORD.is_file():
        pytest.skip("nothing is measured yet")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(read_json(tool.RECORD)), (
        "run `python tools/transforms.py`"
    )


def tiny(place: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(vocab_size=BYTE_VOCAB_SIZE, num_local_experts=4, **SIZES, **HEADS)
    MixtralForCausalLM(config).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_a_tiny_model_is_measured_once_and_has_its_page(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full rank nothing changes; one choice of two is half the work; a method that cannot be
    carried out is a line of the page. A run that was killed goes on, and nothing is done twice; a
    model that cannot be made is left out."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        text = " ".join(str((number * 7919 + i * i) % 1000) for i in range(100))
        (tmp_path / "text" / f"{number}.txt").write_text(text)

    def missing(place: Path) -> None:
        raise tool.made.MissingError("its package is not installed")

    models = {
        "none": tool.Subject(about="None.", make=missing),
        "tiny": tool.Subject(about="A tiny one.", make=tiny, text="../text", methods=SOME),
    }
    settings = tool.Settings(
        models=("none", "tiny"),
        out=str(tmp_path),
        sequence_length=32,
        batch_size=4,
        num_batches=2,
        max_tokens_per_domain=256,
        draws=2,
        rounds=1,
        cache_dir=str(tmp_path / "cache"),
    )
    measure, done = tool.measure, list[str]()

    def counted(model: Any, name: str, settings: Any) -> Any:
        if len(done) == 2:
            done.append("killed")
            raise KeyboardInterrupt
        done.append(name)
        return measure(model, name, settings)

    monkeypatch.setattr(tool, "MODELS", models)
    monkeypatch.setattr(tool, "RECORD", tmp_path / "transforms.json")
    monkeypatch.setattr(tool, "PAGE", tmp_path / "transforms.md")
    monkeypatch.setattr(tool, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        tool.run(settings)
    tool.run(settings)
    assert done == [*SOME[:2], "killed", *SOME[2:]]

    (name, model), *others = read_json(tool.RECORD).items()
    assert (name, others, tuple(model["methods"])) == ("tiny", [], SOME)
    whole, half, refused, fewer = model["methods"].values()
    assert (whole["difference"], whole["bytes"], whole["flops"]) == (0.0, 1.0, 1.0)
    assert (half["flops"], half["serves"], fewer["serves"]) == (0.5, "etr", "hf")
    assert "top_k=2" in refused["refused"]
    for control in fewer["controls"].values():
        assert fewer["difference"] - control["difference"] == pytest.approx(
            control["method_less"]["difference"]
        )
    assert set(fewer["controls"]) == {"random", "magnitude"}
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.page(read_json(tool.RECORD))
    assert all(f"`{one}`" in page for one in SOME)
    assert f"- `{SOME[2]}` is refused: {refused['refused']}" in page


def test_controls_by_hand(tool: Any) -> None:
    """Two layers of three experts of two neurons: as many as the plan has, others than it has."""
    scores = [
        tool.Scores(
            expert=torch.tensor([1.0, 3, 2]),
            matrix=torch.tensor([[9.0, 1, 1], [2, 8, 2], [3, 3, 7]]),
            neuron=torch.tensor([[1.0, 2], [8, 4], [5, 6]]),
        ),
        tool.Scores(
            expert=torch.tensor([6.0, 5, 4]),
            matrix=torch.zeros(3, 3),
            neuron=torch.tensor([[9.0, 0], [0, 0], [0, 3]]),
        ),
    ]

    def made(name: str, **plan: Any) -> Any:
        return tool.CONTROLS[name][0](plan, scores)

    assert made("easy_ep", keep=[[0, 1], [2]]) == {"keep": [[1, 2], [0]]}
    keep = [[[0], [], []], [[0, 1], [0], [0]]]
    assert made("heapr", keep=keep) == {"keep": [[[], [0, 1], [0, 1]], [[0], [], []]]}
    groups = made("mc_smoe", groups=[[0, 0, 0], [0, 1, 1]], usage="as it was")
    assert groups == {"groups": [[1, 1, 1], [0, 1, 0]], "usage": "as it was"}
    bits = [[4, 4, 2, 2, 2, 2, 2, 2, 2], [4] + [2] * 8]
    assert made("quantmoe", bits=bits) == {"bits": [[4, 2, 2, 2, 4, 2, 2, 2, 4], [2] * 9]}
    bits = [[4] * 3 + [2] * 6, [4] * 3 + [2] * 6]
    assert made("edgemoe", bits=bits) == {"bits": [[2] * 9, [4] * 6 + [2] * 3]}
    dense = torch.tensor([[1.0, 9, 3, 5]])
    scores = [tool.Scores(expert=dense[0, :1], matrix=dense[:, :3], neuron=dense)]
    masks = made("read_me", core=[[0, 1]], experts=[[[2], [3]]], router="as it was")
    assert masks == {"core": [[1, 3]], "experts": [[[2], [2]]], "router": "as it was"}
    tasks = torch.tensor([2.0, 4, 1, 3])  # the fourth stands for the base
    scores = [tool.Scores(expert=tasks, matrix=dense[:, :3], neuron=dense)]
    assert made("made_it", of=[[0, 0, 1]], anchor=0) == {"of": [[0, 0, 1]], "anchor": 0}
    assert made("made_it", of=[[0, 1, 1]], anchor=0) == {"of": [[0, 1, 0]], "anchor": 0}


def test_size_of_weights_and_chance(tool: Any, tmp_path: Path) -> None:
    tiny(tmp_path / "tiny")
    (first, second) = tool.magnitudes(tmp_path / "tiny")
    weights = MixtralForCausalLM.from_pretrained(tmp_path / "tiny").model.layers[0].mlp.experts
    gate, down = weights.gate_up_proj[2].double()[:16], weights.down_proj[2].double()
    want = down.square().sum(0) * gate.square().sum(1)
    torch.testing.assert_close(first.neuron[2], want)
    torch.testing.assert_close(first.matrix[2, 2], down.square().mean())
    whole = weights.gate_up_proj[2].double().square().sum() + down.square().sum()
    torch.testing.assert_close(first.expert[2], whole)
    again = tool.drawn([first, second], 1)
    assert torch.equal(again[1].neuron, tool.drawn([first, second], 1)[1].neuron)
    assert not torch.equal(again[1].neuron, tool.drawn([first, second], 2)[1].neuron)


def test_a_mixtral_of_llamas_computes_the_one_that_it_takes(tool: Any) -> None:
    torch.manual_seed(0)
    common = {**tool.made.common(), "hidden_size": 32, "intermediate_size": 16}
    llamas = [LlamaForCausalLM(LlamaConfig(**common)).eval() for _ in range(2)]
    others = {k: v for k, v in llamas[0].state_dict().items() if ".mlp." not in k}
    llamas[1].load_state_dict(others, strict=False)
    config = MixtralConfig(**common, num_local_experts=2, num_experts_per_tok=1)
    mixtral = MixtralForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    for number, llama in enumerate(llamas):
        state = tool.made.of_versions([one.state_dict() for one in llamas])
        for name, value in state.items():
            if ".experts." in name:  # whichever the router takes is this one
                value[:] = value[number].clone()
        mixtral.load_state_dict(state)
        torch.testing.assert_close(mixtral(ids).logits, llama(ids).logits)
