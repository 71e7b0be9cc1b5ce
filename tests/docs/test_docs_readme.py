"""README is short, shows what is generated and what is printed, and names commands that exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from markdown_blocks import ROOT, blocks, links, name_of, pages, run

from etr.cli import VERBS, main

README = ROOT / "README.md"
COMMANDS = ROOT / "docs/commands.md"
MOST_LINES = 170
HEADINGS = (
    *("Measured", "Install, and a layer", "The demo", "Use it if", "Do not use it if"),
    *("Where to go on", "Cite"),
)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_it_is_short_and_in_order() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) <= MOST_LINES
    assert tuple(re.findall(r"^## (.*)$", text_of(README), flags=re.MULTILINE)) == HEADINGS
    start = lines.index("<picture>")
    assert start < 10, "what it is takes some lines, then comes the picture"


def test_the_picture_is_there_light_and_dark_and_says_what_it_shows() -> None:
    (picture,) = re.findall(r"<picture>.*?</picture>", text_of(README), flags=re.DOTALL)
    found = re.findall(r'(?:src|srcset)="([^"]+)"', picture)
    assert [Path(path).stem for path in found] == ["routing-dark", "routing-light"]
    assert all((ROOT / path).is_file() for path in found)
    assert re.search(r'alt="[^"]{20,}"', picture)


def test_the_layer_prints_what_stands_below_it() -> None:
    (example,) = blocks(README, "python")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run(README, example)
    assert len([line for line in example.text.splitlines() if line]) <= 8
    assert out.getvalue() == blocks(README, "text")[0].text


def commands(page: Path) -> list[list[str]]:
    """Words of each command ``etr VERB ...`` of a page, up to what explains it."""
    found = re.findall(
        r"(?:^    |`)(?:\.venv/bin/)?etr ([a-z][^`\n]*)", text_of(page), re.MULTILINE
    )
    return [re.split(r"  |`| -- ", line)[0].split() for line in found]


@pytest.mark.parametrize(
    ("page", "words"),
    [(page, words) for page in (README, COMMANDS) for words in commands(page)],
    ids=lambda value: name_of(value) if isinstance(value, Path) else "-".join(value[:2]),
)
def test_every_command_has_its_verb_and_options(
    page: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert words[0] in VERBS
    options = [word for word in words if word.startswith("--") and word != "--help"]
    parts = words[:2] if words[0] in ("cluster", "theory") else words[:1]
    if "--preset" in words:  # each has options of its own
        parts = words[: words.index("--preset") + 2]
    if not options:
        return
    with pytest.raises(SystemExit):
        main([*parts, "--help-all"])
    known = set(re.findall(r"--\w[\w-]*", capsys.readouterr().out.partition("usage: ")[2]))
    assert set(options) <= known | {"--"}


def test_the_commands_page_lists_every_verb() -> None:
    assert {words[0] for words in commands(COMMANDS)} == set(VERBS)


def test_every_page_is_on_the_map() -> None:
    """Of docs/index.md; results have their own."""
    listed = {
        (place.parent / link.partition("#")[0]).resolve()
        for place in (ROOT / "docs/index.md", ROOT / "docs/results/README.md")
        for link in links(place)
    }
    missing = {name_of(page) for page in pages()} - {
        page.relative_to(ROOT).as_posix() for page in listed if page.is_relative_to(ROOT)
    }
    assert missing <= {"docs/index.md"}
