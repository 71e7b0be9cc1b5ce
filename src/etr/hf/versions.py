"""What differs between the versions of transformers that this library works with."""

from __future__ import annotations

import dataclasses

import transformers
from packaging.specifiers import SpecifierSet
from transformers.modeling_outputs import MoeModelOutputWithPast

from etr.moe.notice import warn

TESTED = ">=5.17,<5.25"
"""Versions of transformers that the tests run with; the extra `hf` asks for these."""


def warn_if_untested(version: str) -> None:
    """Warn where this library was not tested with a version of transformers."""
    if version not in SpecifierSet(TESTED):
        warn(
            f"etr.hf is tested with transformers{TESTED}, and this is {version}: models may fail "
            f"or compute something else; pip install 'transformers{TESTED}'"
        )


warn_if_untested(transformers.__version__)

CACHE = next(
    field.name
    for field in dataclasses.fields(MoeModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""Name of the key-value cache, as an argument and in outputs: `past_key_values` until 5.23, `cache`
from 5.24."""

CACHE_NAMES = ("cache", "past_key_values")
"""Both names: tools written for either ask the model's class and config for its own."""
