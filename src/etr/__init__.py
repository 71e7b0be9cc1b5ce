"""Expert-Token Resonance: Mixture-of-Experts routing for PyTorch.

The layer (`etr.moe`, re-exported here) and the shelf of methods (`etr.methods`) import torch alone;
a method that assigns experts, such as ExFlow, imports SciPy when it runs.
`etr.hf`, `etr.data`, `etr.train`, `etr.report` and the command line come with the extra
``etr-moe[train]``. ``import etr.hf`` tells transformers' Auto classes of this library's models;
this module alone does not.

Names come when they are used: ``import etr`` takes no time, and what needs no torch loads none.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from etr.table import Table

__version__ = "0.1.0"

Table.more_rows_in("etr.methods")


def _found(name: str) -> Any:
    """An attribute that this module does not have yet."""
    if name in ("methods", "moe"):
        return import_module(f"etr.{name}")
    if name == "__all__" or not name.startswith("_"):
        moe = import_module("etr.moe")
        if name == "__all__" or name in moe.__all__:
            value = globals()[name] = getattr(moe, name)
            return value
    raise AttributeError(f"module 'etr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_found("__all__"), "methods", "moe"})


if TYPE_CHECKING:
    from etr import methods as methods
    from etr import moe as moe
    from etr.moe import *  # noqa: F403
    from etr.moe import __all__ as __all__
else:
    __getattr__ = _found
