"""The routers inside other training engines. Each engine is imported where it is used."""

from etr.adapters.dense import DenseRouter, DenseRouting
from etr.adapters.megatron import megatron_router

__all__ = ["DenseRouter", "DenseRouting", "megatron_router"]
