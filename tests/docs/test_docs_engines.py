"""The blocks of the guides to engines and clusters run, where the engine is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_blocks import ROOT, Block, blocks, run

GUIDES = [ROOT / f"docs/guides/{n}.md" for n in ("engines", "cluster", "plan-a-cluster")]
RUNNABLE = [
    (page, block)
    for page in GUIDES
    for block in blocks(page, "python")
    if not block.text.startswith("with etr")  # a training loop cut out of its script
]


@pytest.mark.parametrize(
    ("page", "block"), RUNNABLE, ids=[f"{page.stem}:{block.line}" for page, block in RUNNABLE]
)
def test_blocks_run_as_shown(page: Path, block: Block) -> None:
    if "megatron.core" in block.text:
        pytest.importorskip("megatron.core")
    assert "assert" in block.text
    run(page, block)
