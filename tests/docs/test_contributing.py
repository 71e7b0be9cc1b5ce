"""The walk-through in CONTRIBUTING.md, followed to the letter in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from markdown_blocks import ROOT, blocks

import etr
from etr.methods import METHODS, import_file, options_of
from etr.methods.own import MODULES

PAGE = ROOT / "CONTRIBUTING.md"
SHELF = "src/etr/methods/__init__.py"
METHOD, OWN, TEST = "src/etr/methods/cosine.py", "my_method.py", "tests/methods/test_cosine.py"
CARDS = "tests/methods/test_cards.py"
CONFORMANCE = ("tests/conformance/test_conformance_reference.py",)
"""What is run for the copy: values and gradients against plain loops, in every cell. Other files
read the same cells, and would take minutes."""
LEAST_TESTS = 15
"""Fewer than there are: more than would be left if the suite stopped reading the tables."""


def apply_diff(text: str, hunks: str) -> str:
    """Apply the hunks of a diff whose context occurs exactly once in `text`."""
    for hunk in hunks.split("@@ @@\n")[1:]:
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before) == 1, f"context not found once:\n{before}"
        text = text.replace(before, after)
    return text


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    """The files of the page, by the path in their first line."""
    found = {}
    for block in blocks(PAGE, "python"):
        path, _, source = block.text.partition("\n")
        found[path.removeprefix("# ")] = source
    assert set(found) == {METHOD, OWN, TEST}
    return found


@pytest.fixture(scope="module")
def copy(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library and its tests of methods and conformance, with the method as shown."""
    root = tmp_path_factory.mktemp("contribution")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("src", "tests/conformance", "tests/methods"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for path in (ROOT / "pyproject.toml", *(ROOT / "tests").glob("*.py")):
        shutil.copy(path, root / path.relative_to(ROOT))
    for name in (METHOD, TEST):
        (root / name).write_text(files[name], encoding="utf-8")
    (shelf,) = blocks(PAGE, "diff")
    assert f"+++ b/{SHELF}\n" in shelf.text
    changed = apply_diff((root / SHELF).read_text(encoding="utf-8"), shelf.text)
    (root / SHELF).write_text(changed, encoding="utf-8")
    return root


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True
    )


def test_the_blocks_are_formatted(copy: Path) -> None:
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        result = run(copy, "-m", *tool, METHOD, SHELF, TEST)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def own(files: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """The file of one's own; what it adds is taken off again."""
    path = tmp_path / OWN
    path.write_text(files[METHOD] + files[OWN], encoding="utf-8")
    yield path
    METHODS.pop("cosine", None)
    etr.ROUTERS.pop("cosine", None)
    for name in [name for name in sys.modules if name.startswith(MODULES)]:
        del sys.modules[name]


def test_a_file_of_ones_own_adds_the_method(own: Path) -> None:
    import_file(own)
    assert options_of("cosine:temperature=5") == {"router": "cosine:temperature=5"}
    assert METHODS["cosine"].causal is True
    config = etr.MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, router="cosine")
    assert etr.MoE(config)(torch.randn(8, 16)).hidden_states.shape == (8, 16)


@pytest.mark.slow
def test_the_method_is_tested_on_the_shelf(copy: Path) -> None:
    """Its own test, the tests of its card, and conformance, which reads the tables."""
    which = "cosine and not score or every_file_is_a_method"  # not etr's option score=cosine
    result = run(copy, "-m", "pytest", TEST, CARDS, *CONFORMANCE, "-k", which)
    tail = result.stdout[-4000:] + result.stderr[-2000:]
    assert result.returncode == 0, tail
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, tail
    assert int(passed[1]) >= LEAST_TESTS, tail
