"""The pictures of docs/gallery.md: every figure of a comparison, and its report in a browser.

    python tools/pictures.py COMPARISON

Screens need Chromium (tests/report/install_chromium.sh installs one); figures do not.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from etr.report import write_report
from etr.report.figures import write_figures

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
THEMES = {"dark": 0, "light": 1}
"""Chromium's numbers of the themes that a page may be asked for."""
WIDTHS = (1440, 390)
"""Of a desktop and a phone, CSS pixels."""
SHARED = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
WAIT = "--virtual-time-budget=60000"


def main(comparison: Path) -> None:
    """Write the figures' files and the screens of the demo's report and of one of 12 variants."""
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
        page = write_report(comparison, Path(scratch) / "report.html")
        for theme in THEMES:
            for width in WIDTHS:
                screen(chromium, page, theme, width, IMAGES / f"report-{width}-{theme}.png")
        many_variants(Path(scratch), 12, "of a sweep", seeds=3, steps=160)
        page = write_report(Path(scratch), Path(scratch) / "many.html", title="Twelve variants")
        screen(chromium, page, "light", 1440, IMAGES / "report-12-variants.png", height=4600)


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
