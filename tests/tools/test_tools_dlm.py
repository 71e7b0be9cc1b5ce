"""The page of `make dlm`, from a model of two steps."""

from __future__ import annotations

import importlib.util
import random
import re
from pathlib import Path

import pytest

from etr.cli import main

ROOT = Path(__file__).resolve().parents[2]
SIZE = (
    "--hidden-size 16 --num-layers 1 --num-heads 2 --num-key-value-heads 2 --num-experts 8 "
    "--top-k 2 --expert-size 8 --sequence-length 16 --batch-size 4 --steps 2 --device cpu "
    "--eval-tokens-per-domain 64 --no-diagnostics --profile-every None --router token_choice "
    "--capacity none --objective block_diffusion:block=4"
)


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("dlm_tool", ROOT / "tools/dlm.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "text").mkdir()
    for number in range(40):
        stream = random.Random(number)
        words = " ".join(stream.choice("abcdefgh") * 3 for _ in range(60))
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}: {words}\n")
    text = ["--data", str(tmp_path / "text"), "--cache-dir", str(tmp_path / "cache")]
    assert main(["train", "--out", str(tmp_path / "run"), *text, *SIZE.split()]) == 0
    page = tool.text_of(str(tmp_path / "run"), 128, prompts=2)
    assert "2 steps, 8 experts, 2 a token, blocks of 4." in page
    cells = [row.split(" | ") for row in re.findall(r"(?m)^\| (.*) \|$", page)]
    of = {row[0].strip("`"): row[1:] for row in cells}
    shared, own = of["dynamic_sharing:beta=0.5"], of["dropless"]
    assert float(shared[3]) <= 4
    assert 2 <= float(own[3]) <= 8
    assert abs(float(shared[0]) - float(own[0]) - float(shared[1].split()[0])) < 2e-4
    assert float(of["quota:steps=16"][0]) == 4  # places of a block
    moves = [
        (int(r[0]), int(r[1]), int(r[2]), float(r[3]))
        for r in cells
        if len(r) == 4 and r[0].isdigit()
    ]
    assert [row[:2] for row in moves] == [(size, n) for size in (2, 4) for n in (1, 2, 4, 8)]
    assert all(0 <= row[3] <= 1 for row in moves)
    assert moves[0][2] >= moves[3][2]
