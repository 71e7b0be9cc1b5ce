"""Weights as earlier versions wrote them, for transformers' loader."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

SCALARS = ("router.log_temperature", "router.offset")
"""Single numbers: they had no dimension before they got the one that FSDP needs."""


class _WithDimension(ConversionOps):
    """A single number to [1]; one that is so already stays, and so does one that is saved."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], *_: Any, **__: Any
    ) -> dict[str, list[Tensor]]:
        values = input_dict[source_patterns[0]]
        value = values[0] if isinstance(values, list) else values
        return {source_patterns[0]: [value.reshape(1)]}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def register() -> None:
    """Let transformers read them."""
    converters: list[WeightConverter | WeightRenaming] = [
        WeightConverter(name, name, [_WithDimension()]) for name in SCALARS
    ]
    register_checkpoint_conversion_mapping("etr", converters, overwrite=True)
