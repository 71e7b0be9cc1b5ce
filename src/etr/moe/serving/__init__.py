"""Serving: how a layer routes when it is not training. A file each, one line each in `SERVING`."""

from typing import Any

from etr.moe.serving.base import LayerFacts, Serving
from etr.moe.serving.batch import Batch
from etr.moe.serving.dropless import Dropless
from etr.moe.serving.threshold import Threshold
from etr.moe.table import Table

SERVING: Table[Serving] = Table("serving", (Threshold, Dropless, Batch))
"""Serving policies by name."""

EvalSelection = str  # the type's old name, for one release


def __getattr__(name: str) -> Any:
    if name == "EVAL_SELECTIONS":  # and that of its names
        return tuple(SERVING)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def serving_of(given: str | Serving, field: str = "serving") -> Serving:
    """A policy, from its text if need be.

    Args:
        given: a policy, or its name, perhaps with options (``name:option=value``).
        field: what errors call it.
    Raises:
        TypeError: neither.
        ValueError: the name or an option is unknown, or a value is refused.
    """
    if isinstance(given, Serving):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"{field} is {type(given).__name__}; it must be the name of a serving policy, perhaps "
            f"with options, or a Serving. There are {', '.join(SERVING)}"
        )
    return SERVING.parse(given, field)


__all__ = ["SERVING", "LayerFacts", "Serving", "serving_of"]
