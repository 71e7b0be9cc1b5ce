"""The model around the layer: what a method changes there, as protocols and plain rows.

    COMPOSITIONS several models as one   etr.model.composition
    DECODINGS    logits to a choice      etr.model.decoding
    OBJECTIVES   what is trained on      etr.model.objective, .block_diffusion
    TRANSFORMS   weights to weights      etr.model.transform
    UNMASKINGS   which masks are filled  etr.model.unmasking

A method is a frozen config and a few pure functions. It opens no file, loads no model and owns no
loop; runners in `etr.hf` and `etr.train` do. Imports torch alone.
"""

from etr.model.block_diffusion import BlockDiffusion
from etr.model.composition import COMPOSITIONS, Composition
from etr.model.decoding import DECODINGS, Decoding
from etr.model.objective import Causal, Example, Objective, Text
from etr.model.transform import TRANSFORMS, LayerTensors, LazyTensor, Transform
from etr.model.unmasking import UNMASKINGS, Unmasking
from etr.table import Table

OBJECTIVES: Table[Objective] = Table("objective", (Causal, BlockDiffusion))
"""Objectives by name."""

__all__ = [
    "COMPOSITIONS",
    "DECODINGS",
    "OBJECTIVES",
    "TRANSFORMS",
    "UNMASKINGS",
    "BlockDiffusion",
    "Causal",
    "Composition",
    "Decoding",
    "Example",
    "LayerTensors",
    "LazyTensor",
    "Objective",
    "Text",
    "Transform",
    "Unmasking",
]
