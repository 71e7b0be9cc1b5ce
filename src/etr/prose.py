"""Sentences in which commands stand in backticks, as a page and as a terminal show them."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def prose_html(text: str) -> str:
    """A sentence as HTML; what stands in backticks is set as code."""
    return "".join(f"<code>{escape(p)}</code>" if code else escape(p) for p, code in _parts(text))


def prose_text(text: str, style: str = "bold") -> Text:
    """A sentence for rich; what stands in backticks is set in a style."""
    from rich.text import Text

    return Text.assemble(*((part, style if code else "") for part, code in _parts(text)))


def prose_line(text: str, *, terminal: bool) -> str:
    """A sentence to print without rich: on a terminal, what stands in backticks is bold."""
    if not terminal:
        return text
    return "".join(f"\033[1m{part}\033[0m" if code else part for part, code in _parts(text))


def _parts(text: str) -> list[tuple[str, bool]]:
    parts = re.split(r"`([^`\s](?:[^`]*[^`\s])?)`", text)
    return [(part, place % 2 == 1) for place, part in enumerate(parts)]
