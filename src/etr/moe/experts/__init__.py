"""Experts: their weights, and the backends that run them."""

from etr.moe.experts.backends import EXPERT_BACKENDS, ExpertBackend
from etr.moe.experts.weights import ACTIVATIONS, Activation, ExpertParams, ExpertWeights, activate

__all__ = [
    "ACTIVATIONS",
    "EXPERT_BACKENDS",
    "Activation",
    "ExpertBackend",
    "ExpertParams",
    "ExpertWeights",
    "activate",
]
