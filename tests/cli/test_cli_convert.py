"""`etr convert` and docs/guides/convert.md: commands, printed results, refusals."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

from markdown_blocks import ROOT, Block, blocks, run

from etr.cli import main
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.hf import FAMILIES, load_pretrained
from etr.hf.shards import ShardReader
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
PAGE = ROOT / "docs/guides/convert.md"
COMMANDS = [line for block in blocks(PAGE, "sh") for line in block.text.splitlines()]
SMALL = "--sequence-length 32 --batch-size 4 --num-batches 2 --calibrate my-text --cache-dir cache"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of transformers and a text."""
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=BYTE_VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            initializer_range=0.2,
        )
    )
    model.save_pretrained(folder / "mixtral")
    tokenizer.save_pretrained(folder / "mixtral")
    (folder / "my-text").mkdir()
    for number in range(40):
        text = " ".join(str((number * 7919 + i * i) % 1000) for i in range(100))
        (folder / "my-text" / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def etr(command: str) -> int:
    """Exit status of a command line; options that contradict each other end the parser."""
    try:
        return main(shlex.split(command)[1:])
    except SystemExit as error:
        return int(error.code or 0)


def test_the_commands_of_the_guide(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, back, swapped, tight = COMMANDS
    assert etr(there) == 0
    out = capsys.readouterr().out
    assert "mixtral-etr (mixtral as etr, 37 tensors" in out
    difference = float(out.partition("logits differ by at most ")[2].split()[0])
    assert difference < 1e-5
    assert etr(back) == 0
    first, again = ShardReader("mixtral"), ShardReader("mixtral-again")
    assert all(torch.equal(first.tensor(key), again.tensor(key)) for key in first.keys())  # noqa: SIM118
    assert etr(f"{swapped} {SMALL}") == 0
    out = capsys.readouterr().out
    for words in ("original router", "orthonormal router", "temperatures fitted", "thresholds of"):
        assert words in out
    assert "tokens choose other experts than before" in " ".join(out.split())
    assert etr(f"{tight} {SMALL}") == 0
    for name in ("mixtral-resonance", "mixtral-tight"):
        model = load_pretrained(name)
        assert all(layer.has_thresholds() for layer in moe_layers(model))
        assert (place / name / "tokenizer.json").is_file()
        assert not (place / f"{name}.keep").exists()
    layer = moe_layers(load_pretrained("mixtral-tight"))[0]
    assert layer.config.capacity_config.capacity_factor == 0.6
    assert bool((layer.calibration.threshold > -torch.inf).any())
    assert etr("etr convert mixtral-tight back") == 2
    assert "mixtral cannot hold this model: router is 'etr'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "block", blocks(PAGE, "python"), ids=[f"line {b.line}" for b in blocks(PAGE, "python")]
)
def test_blocks_run_as_shown(block: Block) -> None:
    assert "assert" in block.text
    run(PAGE, block)


def test_the_guide_lists_every_family() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"\n| `{name}` |" not in text] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nowhere x", "nowhere is not a folder"),
        ("mixtral my-text", "exists already"),
        ("mixtral my-text --router etr", "exists already"),
        ("mixtral x --router etr --to hf", "no family of transformers has that router"),
        ("mixtral x --num-batches 0", "num_batches=0 must be at least 1"),
        ("mixtral x --capacity nope", "capacity='nope' is unknown"),
    ],
)
def test_errors_say_what_is_wrong(
    options: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etr(f"etr convert {options}") == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (place / "x").exists()


def test_a_tokenizer_without_special_tokens(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Converting needs none; calibrating ends documents with eos, and pads with it if need be."""
    for name, missing in (("no-pad", ["pad_token"]), ("no-eos", ["pad_token", "eos_token"])):
        source = tmp_path / name
        MixtralForCausalLM.from_pretrained("mixtral").save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        for path in source.glob("*token*.json"):
            values = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in values.items() if k not in missing}))
        assert etr(f"etr convert {source} {tmp_path / name}-kept --no-compare") == 0
    swap = f"--router etr {SMALL}"
    assert etr(f"etr convert {tmp_path}/no-pad {tmp_path}/swapped {swap}") == 0
    assert etr(f"etr convert {tmp_path}/no-eos {tmp_path}/other {swap}") == 2
    assert "has no eos_token" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
