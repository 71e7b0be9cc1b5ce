"""The documentation as a site, with an API page from docstrings and search.

    python tools/site.py

Pages link to each other from README on, so the site has the repository's folders: README beside
docs. It asks the network for nothing, and its search works from a folder.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from mkdocs.commands.build import build as build_pages
from mkdocs.config import load_config

import etr

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SHIM = "https://unpkg.com/iframe-worker/shim"
WORKER = "frame_worker.js"


def build(target: Path = ROOT / "build") -> Path:
    """Build the site anew in `target`; returns its first page."""
    source, site = target / "docs", target / "site"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source / "docs")
    for page in PAGES:
        shutil.copy(ROOT / page, source / page)
    # Pages link to code too, which the site has not; a test holds these links.
    logging.getLogger("mkdocs").setLevel(logging.ERROR)
    own = {"docs_dir": str(source), "site_dir": str(site), "site_name": f"etr {etr.__version__}"}
    build_pages(load_config(str(ROOT / "mkdocs.yml"), **own))
    shutil.copy(ROOT / "tools" / WORKER, site / WORKER)
    use_own_worker(site)
    return site / "index.html"


def use_own_worker(site: Path) -> None:
    """Let pages load the script of their search from the site's folder.

    Raises:
        ValueError: no page loads the script that is replaced.
    """
    found = False
    for page in site.rglob("*.html"):
        to_root = "../" * (len(page.relative_to(site).parts) - 1)
        text = page.read_text(encoding="utf-8")
        found |= SHIM in text
        page.write_text(text.replace(SHIM, to_root + WORKER), encoding="utf-8")
    if not found:
        raise ValueError(f"no page of {site} loads {SHIM}: the theme's search has changed")


if __name__ == "__main__":
    print(build())
