"""Training and comparing language models."""

from etr.train.compare import CompareConfig, compare
from etr.train.config import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig
from etr.train.loop import TrainingDiverged, TrainResult, train
from etr.train.model import build_model
from etr.train.variants import Variant, parse_variant

__all__ = [
    "CompareConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RoutingOptions",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "Variant",
    "build_model",
    "compare",
    "parse_variant",
    "train",
]
