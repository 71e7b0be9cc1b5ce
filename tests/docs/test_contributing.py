"""The walk-through in CONTRIBUTING.md, followed to the letter in a copy of the source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_blocks import ROOT, blocks

PAGE = ROOT / "CONTRIBUTING.md"
ROUTER = "src/etr/moe/routers/cosine.py"
TABLE = "src/etr/moe/routers/__init__.py"
LEAST_TESTS = 150
"""Far fewer than there are: what would be left if the suite stopped reading the tables."""


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
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library and its conformance tests with the new router added as shown."""
    root = tmp_path_factory.mktemp("contribution")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", root / "src", ignore=ignored)
    shutil.copytree(ROOT / "tests/conformance", root / "tests/conformance", ignore=ignored)
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, root / name)

    (router,) = blocks(PAGE, "python")
    path, _, source = router.text.partition("\n")
    assert path == f"# {ROUTER}"
    (root / ROUTER).write_text(source, encoding="utf-8")
    (table,) = blocks(PAGE, "diff")
    assert f"+++ b/{TABLE}\n" in table.text
    changed = apply_diff((root / TABLE).read_text(encoding="utf-8"), table.text)
    (root / TABLE).write_text(changed, encoding="utf-8")
    return root


def run(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True
    )


def test_the_router_is_in_the_table(copy: Path) -> None:
    code = "import etr; print(etr.__file__); print(etr.ROUTERS['cosine']().summary)"
    file, summary = run(copy, "-c", code).stdout.splitlines()
    assert Path(file).is_relative_to(copy)
    assert summary == "cosine to learned expert directions, top-k per token"


def test_the_blocks_are_formatted(copy: Path) -> None:
    for tool in (["ruff", "check"], ["ruff", "format", "--check"]):
        result = run(copy, "-m", *tool, ROUTER, TABLE)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_conformance_picks_the_router_up(copy: Path) -> None:
    result = run(copy, "-m", "pytest", "tests/conformance", "-k", "cosine")
    tail = result.stdout[-4000:] + result.stderr[-2000:]
    assert result.returncode == 0, tail
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, tail
    assert int(passed[1]) >= LEAST_TESTS, tail
