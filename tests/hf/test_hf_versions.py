"""Which transformers is tested, and what is said of another."""

from __future__ import annotations

import importlib
import tomllib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from etr.hf import FAMILIES, versions

PYPROJECT = Path(__file__).resolve().parent.parent.parent / "pyproject.toml"


def test_the_tested_range_is_what_the_extra_asks_for() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    assert f"transformers{versions.TESTED}" in project["optional-dependencies"]["hf"]


@pytest.mark.parametrize("version", ["5.16.1", "5.25.0.dev0", "5.25.0", "6.0.0"])
def test_an_untested_transformers_is_named_with_the_range(version: str) -> None:
    with pytest.warns(UserWarning, match=rf"transformers>=5\.17,<5\.25, and this is {version}"):
        versions.warn_if_untested(version)


@pytest.mark.parametrize("version", ["5.17.0", "5.24.0", "5.24.3"])
def test_a_tested_transformers_is_taken_without_a_word(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_if_untested(version)


def test_gpt_oss_without_options_of_its_activation_has_the_constants() -> None:
    """As in transformers 5.17."""
    found = FAMILIES["gpt_oss"].experts(SimpleNamespace())
    assert (found["swiglu_limit"], found["swiglu_alpha"]) == (7.0, 1.702)


def test_the_import_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.warns(UserWarning, match="this is 5.99.0") as caught:
        importlib.reload(versions)
    assert len(caught) == 1
