from pathlib import Path

import pytest
from invented_results import make_results


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole comparison; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    make_results(folder, steps=120)
    return folder
