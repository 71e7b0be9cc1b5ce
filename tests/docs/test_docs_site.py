"""The documentation as a site: an API page from docstrings, and search, without a network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "report"))

from browser import NAMES, find_chromium  # noqa: E402


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    # Not imported by its name, which is that of Python's own module.
    spec = importlib.util.spec_from_file_location("site_tool", TESTS.parent / "tools/site.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def site(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    first: Path = tool.build(tmp_path_factory.mktemp("site"))
    return first.parent


def test_a_theme_whose_search_has_changed_is_told(tool: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "docs/api.html"
    page.parent.mkdir()
    page.write_text(f'{{"worker": "{tool.SHIM}"}}')
    tool.use_own_worker(tmp_path)
    assert page.read_text() == '{"worker": "../frame_worker.js"}'
    with pytest.raises(ValueError, match=r"no page of .* loads https://unpkg\.com"):
        tool.use_own_worker(tmp_path)


def test_the_api_page_has_fields_and_their_lines(site: Path) -> None:
    page = (site / "docs/api.html").read_text()
    ids = set(re.findall(r' id="(etr\.[\w.]+)"', page))
    assert {"etr.moe.MoE.forward", "etr.moe.MoEConfig", "etr.train.TrainConfig"} <= ids
    assert {"etr.report.write_report", "etr.hf.EtrForCausalLM"} <= ids
    assert "Experts a token may choose." in page


def test_no_page_asks_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r'(?:src="|<link[^>]*href=")(?:https?:)?//', page.read_text()), page


@pytest.mark.slow
@pytest.mark.skipif(
    find_chromium() is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH"
)
def test_a_browser_searches_in_a_folder(site: Path, tmp_path: Path) -> None:
    chromium = find_chromium()
    assert chromium is not None
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr")
    done = subprocess.run(
        [
            *(chromium, *flags, *offline, "--virtual-time-budget=20000", "--dump-dom"),
            f"--user-data-dir={tmp_path}",
            f"{(site / 'docs/api.html').as_uri()}?q=MoEConfig",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    hits = re.findall(r'<a href="([^"]*)" class="md-search-result__link"', done.stdout)
    assert any(re.search(r"docs/api\.html\?\S*#etr\.moe\.MoEConfig$", hit) for hit in hits), hits
