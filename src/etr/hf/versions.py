"""What differs between the versions of transformers that this library works with."""

from __future__ import annotations

import dataclasses

from transformers.modeling_outputs import MoeModelOutputWithPast

CACHE = next(
    field.name
    for field in dataclasses.fields(MoeModelOutputWithPast)
    if field.name in ("cache", "past_key_values")
)
"""Name of the key-value cache, as an argument and in outputs: `past_key_values` until 5.23, `cache`
from 5.24."""
CACHE_NAMES = ("cache", "past_key_values")
"""Both names: tools written for either ask the model's class and config for its own."""
