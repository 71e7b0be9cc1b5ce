"""The model around the layer: what a method changes there, as protocols and plain rows.

    DECODINGS    logits to a choice      etr.model.decoding
    OBJECTIVES   what is trained on      etr.model.objective
    TRANSFORMS   weights to weights      etr.model.transform

A method is a frozen config and a few pure functions. It opens no file, loads no model and owns no
loop; runners in `etr.hf` do. Imports torch alone.
"""

from etr.model.decoding import DECODINGS, Decoding
from etr.model.objective import OBJECTIVES, Causal, Example, Objective, Text
from etr.model.transform import TRANSFORMS, LayerTensors, LazyTensor, Transform

__all__ = [
    "DECODINGS",
    "OBJECTIVES",
    "TRANSFORMS",
    "Causal",
    "Decoding",
    "Example",
    "LayerTensors",
    "LazyTensor",
    "Objective",
    "Text",
    "Transform",
]
