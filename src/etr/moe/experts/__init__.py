"""Experts: their weights, and the backends that run them."""

from etr.moe.experts.activation import ACTIVATIONS, GATED, Activation, Clamp, activate
from etr.moe.experts.backends import EXPERT_BACKENDS, ExpertBackend, auto_backend
from etr.moe.experts.shared import SharedGate, run_shared
from etr.moe.experts.weights import ExpertParams, ExpertWeights

__all__ = [
    "ACTIVATIONS",
    "EXPERT_BACKENDS",
    "GATED",
    "Activation",
    "Clamp",
    "ExpertBackend",
    "ExpertParams",
    "ExpertWeights",
    "SharedGate",
    "activate",
    "auto_backend",
    "run_shared",
]
