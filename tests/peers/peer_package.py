"""transformers' tests as an importable package, with stand-ins for what an archive lacks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ABSENT = {
    "generation.test_utils": "GenerationTesterMixin",
    "exporters.test_export": "ExportTesterMixin",
}
"""Mixins that the common tester imports and a source archive does not hold."""


def import_tests(folder: Path) -> bool:
    """Make `tests` the package in `folder`, as transformers' tests import each other.

    Returns:
        Whether it is whole: it has the generation tests and the tester of causal language models.
    """
    _add("tests", folder)
    whole = (folder / "causal_lm_tester.py").is_file()
    if not whole:
        for name, mixin in ABSENT.items():
            package, module = (f"tests.{part}" for part in (name.split(".")[0], name))
            _add(package)
            setattr(_add(module), mixin, type(mixin, (), {}))
    importlib.import_module("tests.test_modeling_common")
    return whole


def _add(name: str, folder: Path | None = None) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = [] if folder is None else [str(folder)]
    sys.modules[name] = module
    return module
