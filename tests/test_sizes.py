"""No file is longer than a person reads at once, and functions fit a screen."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
"""Lines; of a function, its signature and docstring count too."""
WHOLE = {
    ("triton_experts.py", "up_kernel"),
    ("triton_experts.py", "hidden_grad_kernel"),
}
"""Kernels for GPUs, whose signature names every pointer, stride and block size: what is in them
shares registers, so that no part of one can be a function of its own."""
FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SRC)) for path in FILES])
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    long = {
        node.name: length
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := _length(node)) > LONGEST_FUNCTION
        and (path.name, node.name) not in WHOLE
    }
    assert long == {}


def test_exceptions_are_still_needed() -> None:
    (kernels,) = SRC.rglob("triton_experts.py")
    nodes = ast.walk(ast.parse(kernels.read_text(encoding="utf-8")))
    lengths = {n.name: _length(n) for n in nodes if isinstance(n, ast.FunctionDef)}
    assert all(lengths[name] > LONGEST_FUNCTION for _, name in WHOLE)


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1
