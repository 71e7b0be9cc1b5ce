"""Expert-Token Resonance: Mixture-of-Experts routing for PyTorch.

The layer (`etr.moe`, re-exported here) and the shelf of methods (`etr.methods`) need torch alone.
`etr.hf`, `etr.data`, `etr.train`, `etr.report` and the command line come with the extra
``etr-moe[train]``. ``import etr.hf`` tells transformers' Auto classes of this library's models;
this module alone does not.
"""

from etr.moe import *  # noqa: F403
from etr.moe import __all__ as __all__

from etr import methods as methods  # isort: skip  # adds rows to the layer's tables

__version__ = "0.1.0"
