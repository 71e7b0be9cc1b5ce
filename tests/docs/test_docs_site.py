"""The documentation as a site: an API page from docstrings, and search, without a network."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("mkdocstrings", reason="no mkdocstrings: `make docs` installs it")
TOOL = Path(__file__).parents[2] / "tools/site.py"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("site_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    first: Path = tool.build(tmp_path_factory.mktemp("site"))
    return first.parent


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
@pytest.mark.skipif(CHROMIUM is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH")
def test_a_browser_searches_in_a_folder(site: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr")
    done = subprocess.run(
        [
            *(CHROMIUM, *flags, *offline, "--virtual-time-budget=20000", "--dump-dom"),
            f"--user-data-dir={tmp_path}",
            f"{(site / 'docs/api.html').as_uri()}?q=MoEConfig",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r'md-search-result__meta">(\d+) matching', done.stdout)
    assert found is not None
    assert int(found.group(1)) > 0
    assert "docs/api.html" in done.stdout
