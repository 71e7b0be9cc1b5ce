from pathlib import Path

import pytest
from invented_results import make_results

from etr.report import FIGURES


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole comparison; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    make_results(folder, steps=120)
    return folder


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pages get the first figures only, for tests of the page around them; says how many."""
    monkeypatch.setattr("etr.report.figures.FIGURES", FIGURES[:3])
    return 3
