"""docs/theory.md: its blocks run as shown, and its table is what the functions give."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

from markdown_blocks import ROOT, Block, blocks, run

from etr.theory.tables import success_rows

PAGE = ROOT / "docs/theory.md"
SNIPPETS = blocks(PAGE, "python")


@pytest.mark.parametrize("block", SNIPPETS, ids=[str(block.line) for block in SNIPPETS])
def test_theory_blocks_run_as_shown(block: Block) -> None:
    assert "assert" in block.text
    run(PAGE, block)


def test_every_statement_has_a_check() -> None:
    text = PAGE.read_text(encoding="utf-8")
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    prose = {"The model", "What rests on an assumption"}
    unchecked = {part.partition("\n")[0] for part in parts if "```python" not in part}
    assert unchecked == prose


def test_the_table_is_what_the_functions_give() -> None:
    text = PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"^\| ([\d.]+) \| (\d+) \| (.+) \|$", text, flags=re.MULTILINE)
    factors = [float(factor) for factor, _, _ in shown]
    assert len(factors) == 5
    fixed, noisy = (success_rows(factors, 128, 8, 1.5, noisy) for noisy in (False, True))
    for line, (_, capacity, cells) in enumerate(shown):
        rows = [*fixed[3 * line : 3 * line + 3], *noisy[3 * line : 3 * line + 3]]
        assert {row[1] for row in rows} == {int(capacity)}
        assert cells == " | ".join(f"{row[3]:.4f}" for row in rows)


def test_theory_imports_nothing_of_the_layer() -> None:
    for path in (ROOT / "src/etr/theory").glob("*.py"):
        found = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), flags=re.MULTILINE)
        for module in found:
            root = module.split(".")[0]
            own = module == "etr.theory" or module.startswith("etr.theory.")
            assert own or root in {"numpy", "scipy", *sys.stdlib_module_names}, f"{path}: {module}"
