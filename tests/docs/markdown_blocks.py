"""Reading the documentation: its files, fenced blocks and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Args:
        language: word after the fence, or empty.
        text: what stands between the fences.
        line: line number of the block's first line in its file.
    """

    language: str
    text: str
    line: int


def pages() -> list[Path]:
    """Every Markdown file that belongs to the project."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """Fenced blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(language=match[1], text=match[2], line=line))
    return [block for block in found if block.language == language]


def links(page: Path) -> list[str]:
    """Targets of links and pictures outside fenced blocks."""
    return _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))


def run(page: Path, block: Block) -> dict[str, object]:
    """Execute a python block as shown, in a fresh namespace; tracebacks name page and line."""
    padded = "\n" * (block.line - 1) + block.text
    namespace: dict[str, object] = {"__name__": "__main__"}
    exec(compile(padded, str(page), "exec"), namespace)
    return namespace
