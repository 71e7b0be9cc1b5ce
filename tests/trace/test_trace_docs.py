"""docs/trace.md: its blocks run as shown, and its columns are those of the file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

from markdown_blocks import ROOT, Block, blocks, run

from etr.trace import schema

PAGE = ROOT / "docs/trace.md"
SNIPPETS = blocks(PAGE, "python")


@pytest.mark.parametrize("block", SNIPPETS, ids=[str(block.line) for block in SNIPPETS])
def test_trace_blocks_run_as_shown(block: Block) -> None:
    assert "assert" in block.text
    for package in ("pandas", "transformers"):
        if f"import {package}" in block.text:
            pytest.importorskip(package)
    run(PAGE, block)


def test_the_columns_are_those_of_the_file() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert listed == [*schema.SCHEMA.names, *schema.OPTIONAL.names]
    assert schema.__doc__ is not None
    assert re.findall(r"^    (\w+)  ", schema.__doc__, flags=re.MULTILINE) == listed
