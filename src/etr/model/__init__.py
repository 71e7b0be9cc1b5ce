"""The model around the layer: what a method changes there, as protocols and plain rows.

    TRANSFORMS   weights to weights      etr.model.transform

A method is a frozen config and a few pure functions. It opens no file, loads no model and owns no
loop; runners in `etr.hf` do. Imports torch alone.
"""

from etr.model.transform import TRANSFORMS, LayerTensors, LazyTensor, Transform

__all__ = ["TRANSFORMS", "LayerTensors", "LazyTensor", "Transform"]
