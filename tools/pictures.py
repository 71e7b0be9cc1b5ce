"""The pictures of docs/gallery.md: every figure of a comparison, and screens of a browser.

    python tools/pictures.py COMPARISON

Screens, README's first and the reports of the comparison and of 12 variants, need Chromium
(tests/report/install_chromium.sh installs one); figures do not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from markdown_it import MarkdownIt

from etr.report import write_report
from etr.report.figures import write_figures

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
THEMES = {"dark": 0, "light": 1}
"""Chromium's numbers of the themes that a page may be asked for."""
WIDTHS = (1440, 390)
"""Of a desktop and a phone, CSS pixels."""
STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d1d9e0, #3d444d) }
body { margin: 32px auto; max-width: 860px; padding: 0 20px; font: 16px/1.5 sans-serif;
       color: light-dark(#1f2328, #f0f6fc); background: light-dark(#fff, #0d1117) }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: 6px }
a { color: light-dark(#0969da, #4493f8) }
img { max-width: 100% }
pre { overflow: auto; padding: 16px; background: light-dark(#f6f8fa, #151b23) }
table { border-collapse: collapse } th, td { border: 1px solid var(--line); padding: 6px 13px }
"""
"""Of README, much as sites of repositories show one."""
SHARED = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
WAIT = "--virtual-time-budget=60000"


def main(comparison: Path) -> None:
    """Write the figures' files and the screens."""
    sys.path.insert(0, str(ROOT / "tests/report"))
    from browser import find_chromium
    from invented_results import many_variants

    gallery = IMAGES / "gallery"
    for path in write_figures(comparison, gallery):
        if path.suffix == ".png":
            path.unlink()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no Chromium on PATH: the screens of the report were not made")
    with tempfile.TemporaryDirectory() as scratch:
        page = readme(Path(scratch))
        for theme in THEMES:
            screen(chromium, page, theme, 960, IMAGES / f"readme-{theme}.png", height=1080)
        page = write_report(comparison, Path(scratch) / "report.html")
        for theme in THEMES:
            for width in WIDTHS:
                screen(chromium, page, theme, width, IMAGES / f"report-{width}-{theme}.png")
        many_variants(Path(scratch), 12, "of a sweep", seeds=3, steps=160)
        page = write_report(Path(scratch), Path(scratch) / "many.html", title="Twelve variants")
        screen(chromium, page, "light", 1440, IMAGES / "report-12-variants.png", height=4600)


def readme(folder: Path) -> Path:
    """README as a page of HTML in a folder; its pictures stay where they are."""
    text = MarkdownIt("commonmark").enable("table").render((ROOT / "README.md").read_text("utf-8"))
    page = folder / "readme.html"
    head = f'<meta charset="utf-8"><base href="{ROOT.as_uri()}/"><style>{STYLE}</style>'
    page.write_text(f"<!doctype html>{head}{text}", encoding="utf-8")
    return page


def screen(
    chromium: str, page: Path, theme: str, width: int, target: Path, height: int = 1800
) -> None:
    """What a browser's window shows of a page, at its top."""
    command = [
        *(chromium, *SHARED, WAIT),
        f"--user-data-dir={page.parent / 'profile'}",
        f"--blink-settings=preferredColorScheme={THEMES[theme]}",
        f"--window-size={width},{height}",
        f"--screenshot={target}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=600)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
