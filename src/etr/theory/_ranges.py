"""Arguments of the theory as float64 arrays, checked once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def counts(name: str, value: ArrayLike, least: int = 1) -> Array:
    """Whole numbers >= least, any shape, as float64.

    Raises:
        ValueError: a value is not whole or too small.
    """
    array = np.asarray(value, dtype=np.float64)
    _check(name, array, lambda x: (x >= least) & (x == np.floor(x)), f"whole numbers >= {least}")
    return array


def between(name: str, value: ArrayLike, low: float, high: float) -> Array:
    """Numbers in [low, high], any shape, as float64.

    Raises:
        ValueError: a value lies outside or is NaN.
    """
    array = np.asarray(value, dtype=np.float64)
    _check(name, array, lambda x: (x >= low) & (x <= high), f"numbers in [{low:g}, {high:g}]")
    return array


def rates(name: str, value: ArrayLike) -> Array:
    """Probabilities with one entry per expert in the last dimension, [..., E].

    Raises:
        ValueError: there is no expert, or a value lies outside [0, 1].
    """
    array = between(name, value, 0.0, 1.0)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} has shape {array.shape}; it needs one probability per expert")
    return array


def _check(name: str, array: Array, right: Callable[[Array], NDArray[np.bool_]], what: str) -> None:
    wrong = ~right(array) | ~np.isfinite(array)
    if wrong.any():
        raise ValueError(f"{name}={array[wrong].flat[0]:g} is out of range; it must hold {what}")
