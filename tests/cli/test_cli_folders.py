"""Folders that bring code, and folders of other models, at every verb that takes a model."""

from __future__ import annotations

import ast
import io
import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from etr.cli import main
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "vocab_size": BYTE_VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
}
TEXT = "--data text.txt --cache-dir cache --sequence-length 16 --batch-size 2"
MOVE = "--calibrate text.txt --cache-dir cache --sequence-length 16 --batch-size 2 --num-batches 1"
COMMANDS = {
    "generate": "generate ours --max-new-tokens 2",
    "evaluate": f"evaluate ours theirs {TEXT} --max-tokens-per-domain 64",
    "convert": f"convert theirs new {MOVE}",
    "convert back": f"convert ours new {MOVE}",
    "convert etr": f"convert theirs new --router etr {MOVE}",
    "export": f"export ours new {TEXT} --num-batches 1",
    "calibrate": f"calibrate routed {TEXT} --num-batches 1",
    "trace ours": f"trace ours {TEXT} --max-tokens 64 --out new.parquet",
    "trace theirs": f"trace theirs {TEXT} --max-tokens 64 --out new.parquet",
    "upcycle": "upcycle dense new --num-experts 2",
    "sft ours": "sft ours --data talks.jsonl --out new --use-cpu --steps 1 --batch-size 2",
    "sft theirs": "sft dense --data talks.jsonl --out new --use-cpu --steps 1 --batch-size 2",
    "finetune": f"finetune ours --recover --out new {TEXT} --calibration-batches 1 "
    "--eval-tokens-per-domain 64 --steps 2",
    "train": f"train --tokenizer ours {TEXT} --steps 1 --out new",
}
CODE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of ours, two of transformers, conversations and a text."""
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    base = MixtralConfig(num_local_experts=2, **SIZES)
    qwen = Qwen3MoeConfig(
        num_experts=2, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=16, **SIZES
    )
    saved = {
        "ours": EtrForCausalLM(EtrConfig.from_base(base, "keep")),
        "routed": EtrForCausalLM(EtrConfig.from_base(base, top_k=1)),
        "theirs": MixtralForCausalLM(base),
        "dense": LlamaForCausalLM(LlamaConfig(**SIZES)),
        "qwen": Qwen3MoeForCausalLM(qwen),
    }
    for name, model in saved.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("a text of some length\n\n" * 200)
    talk = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    (folder / "talks.jsonl").write_text(f"{json.dumps(talk)}\n" * 3)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, with somebody at the keyboard who agrees to everything."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    return tmp_path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_code(folder: Path, *, known: bool) -> Path:
    """Every way in which a folder names code of its own; it would leave a file behind.

    Args:
        folder: of a model with its tokenizer.
        known: whether the folder's classes are known to transformers too.
    """
    marker = folder.parent / f"ran-{folder.name}"
    code = CODE.format(marker=str(marker))
    for name in ("evil.py", "custom_generate/generate.py", "modeling_etr.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "class Evil: ...\ndef generate(*a, **k): ...\n")
    autos = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    edit(folder / "config.json", auto_map=dict.fromkeys(autos, "evil.Evil"))
    options = {} if known else {"tokenizer_class": "Evil"}
    edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        **options,
    )
    edit(folder / "generation_config.json", custom_generate=str(folder))
    return marker


def run(command: str) -> int:
    try:
        return main(shlex.split(command))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("known", [True, False], ids=["known classes", "unknown classes"])
@pytest.mark.parametrize("verb", COMMANDS)
def test_no_code_of_a_folder_runs(
    verb: str, known: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if verb.startswith("sft"):
        pytest.importorskip("trl", reason="needs the extra sft")
    markers = [
        add_code(place / name, known=known) for name in ("ours", "routed", "theirs", "dense")
    ]
    code = run(COMMANDS[verb])
    shown = capsys.readouterr()
    assert not any(marker.exists() for marker in markers)
    assert sys.stdin.tell() == 0  # nobody was asked
    assert "Traceback" not in shown.err
    if known:
        assert code == 0, shown.err
    else:
        assert code in (0, 2)


@pytest.mark.parametrize(
    "verb", ["generate", "calibrate", "export", "finetune", "trace ours", "evaluate"]
)
@pytest.mark.parametrize("model", ["theirs", "qwen"])
def test_a_model_of_transformers_is_refused_with_what_to_run(
    verb: str, model: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a model of this library is needed; `trace` and `evaluate` take both."""
    code = run(COMMANDS[verb].replace("ours", model).replace("routed", model))
    shown = " ".join(capsys.readouterr().err.split())
    if verb in ("trace ours", "evaluate"):
        assert code == 0, shown
    else:
        assert code == 2
        assert "`etr convert SRC DST`" in shown
    assert not (place / "new").exists()


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls of ``NAME.from_pretrained``, with the name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inner = node.func.value
            if node.func.attr == "from_pretrained" and isinstance(inner, ast.Name):
                yield inner.id, node


def test_one_function_calls_the_auto_classes() -> None:
    """`etr.pretrained.from_local`, which downloads nothing and trusts nobody."""
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for folder in ("src", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith("Auto")
    ]
    assert found == []
