"""docs/guides/{finetune,upcycle,shrink,serving,mixtral}.md: blocks and commands run as shown."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

from markdown_blocks import ROOT, Block, blocks, run

from etr.cli import main
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
GUIDES = ("finetune", "upcycle", "shrink", "serving", "mixtral", "place-experts", "offload")
PAGES = [ROOT / "docs/guides" / f"{name}.md" for name in GUIDES]
PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]
COMMANDS = [
    line for page in PAGES for block in blocks(page, "sh") for line in block.text.splitlines()
]
SIZES = "--cache-dir cache --sequence-length 32 --batch-size 4"
TEXT = f"--data my-text {SIZES}"
PACKAGES = (("etr sft", "trl"), ("tuned", "trl"), ("--tasks", "lm_eval"))
"""What a command says, and the package that it or one before it needs."""
SMALL = {  # added to the commands, so that they take little time and read a text of the test's
    "sft": "--use-cpu",
    "finetune": f"{TEXT} --calibration-batches 2 --eval-tokens-per-domain 64",
    "export": f"{TEXT} --num-batches 2",
    "trace": f"{SIZES} --max-tokens 320",
    "transform": "--sequence-length 32 --batch-size 4 --num-batches 2 --cache-dir cache",
    "evaluate": "--sequence-length 32 --batch-size 4 --cache-dir cache",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, a Mixtral, one of ours, conversations and a text."""
    folder = tmp_path_factory.mktemp("guides")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": BYTE_VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    base = MixtralConfig(num_local_experts=4, **sizes)
    models = {
        "dense": LlamaForCausalLM(LlamaConfig(**sizes)),
        "mixtral": MixtralForCausalLM(base),
        "model": EtrForCausalLM(EtrConfig.from_base(base)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    talk = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    (folder / "talks.jsonl").write_text(f"{json.dumps(talk)}\n" * 6)
    question = {"question": "Ice is", "choices": ["cold", "hot"], "answer": 0}
    (folder / "questions.jsonl").write_text(f"{json.dumps(question)}\n" * 2)
    for place, step in (("my-text", 7919), ("other-text", 7907)):
        (folder / place).mkdir()
        for number in range(40):
            text = " ".join(str((number * step + i * i) % 1000) for i in range(100))
            (folder / place / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, verb, *rest = shlex.split(command)
    for part, package in PACKAGES:
        if part in command:
            pytest.importorskip(package)
    code = main([verb, *rest, *shlex.split(SMALL.get(verb, ""))])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    check = CHECKS.get(verb)
    if check is not None:
        check(" ".join(shown.out.split()))


@pytest.mark.parametrize(
    ("page", "block"), PYTHON, ids=[f"{page.stem}:{block.line}" for page, block in PYTHON]
)
def test_python_blocks_run(page: Path, block: Block) -> None:
    """After the commands, whose models they load."""
    for package, use in (("accelerate", "Trainer("), ("peft", "peft")):
        if use in block.text:
            pytest.importorskip(package)
    run(page, block)


def upcycled(shown: str) -> None:
    assert "computes what the dense model does" in shown
    assert "logits differ by at most" in shown
    assert moe_layers(load_pretrained("moe"))[0].config.num_experts == 4


def finetuned(shown: str) -> None:
    if "teacher" in shown:
        assert ("bits a" in shown) == ("by-token" in shown)
        out = Path(shown.rpartition("saved: ")[2])
        results = json.loads((out / "teach.json").read_text())["results"]
        assert list(results) == ["teacher", "before", "after"]
        assert all(f"{name} {one['loss']:.4f}" in shown for name, one in results.items())
        return
    for stage in ("before", "swapped", "calibrated", "recovered"):
        assert stage in shown
    assert all(layer.has_thresholds() for layer in moe_layers(load_pretrained("recovered")))
    assert len(json.loads(Path("recovered/recover.json").read_text())["stages"]) == 4


def exported(shown: str) -> None:
    assert "held-out loss dropless" in shown
    assert "held-out loss plain" in shown
    assert "logits of dropless and plain differ by at most" in shown
    assert json.loads(Path("plain/config.json").read_text())["model_type"] == "mixtral"


def tuned(shown: str) -> None:
    assert "note: the tokenizer has no chat template" in shown
    assert load_pretrained("tuned").config.model_type == "etr"


CHECKS = {"upcycle": upcycled, "finetune": finetuned, "export": exported, "sft": tuned}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("upcycle dense other --num-experts 3 --experts slice", "num_experts=3 must divide"),
        ("upcycle nowhere other --num-experts 3", "is not a folder"),
        ("finetune mixtral", "say --recover"),
        ("export nowhere other --plain", "nowhere"),
        ("sft model --data talks.jsonl --out model", "needs the package|exists already"),
    ],
)
def test_refusals_are_short(
    command: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(shlex.split(command))
    except SystemExit as error:  # options that are wrong in themselves
        code = error.code  # type: ignore[assignment]
    assert code == 2
    shown = capsys.readouterr().err
    assert any(part in " ".join(shown.split()) for part in expected.split("|"))
    assert "Traceback" not in shown
    assert not Path("other").exists()
