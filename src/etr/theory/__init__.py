"""The theorems on routing as functions: exact rates, bounds, capacities, and random samples.

    success       exact success of token and expert choice; the capacity a rate needs
    bounds        the paper's intervals and tighter ones
    geometric     both in the model of orthonormal directions; the crossover
    lower_bound   LocMoE's lower bound of capacity, three forms
    monte_carlo   the geometric model drawn at random, with intervals
    tables        what `etr theory` prints

Needs numpy and SciPy; nothing here knows of tensors or layers. docs/theory.md walks through it.
"""

from etr.theory.bounds import (
    Bounds,
    expert_choice_paper,
    expert_choice_tight,
    token_choice_paper,
    token_choice_tight,
)
from etr.theory.geometric import crossover, false_positive, geometric_success, true_positive
from etr.theory.lower_bound import (
    capacity_lower_bound,
    log_cap_probability,
    log_capacity_lower_bound,
)
from etr.theory.monte_carlo import Estimate, GeometricModel, simulate
from etr.theory.success import (
    expected_kept,
    expert_choice_success,
    required_capacity,
    token_choice_success,
)

__all__ = [
    "Bounds",
    "Estimate",
    "GeometricModel",
    "capacity_lower_bound",
    "crossover",
    "expected_kept",
    "expert_choice_paper",
    "expert_choice_success",
    "expert_choice_tight",
    "false_positive",
    "geometric_success",
    "log_cap_probability",
    "log_capacity_lower_bound",
    "required_capacity",
    "simulate",
    "token_choice_paper",
    "token_choice_success",
    "token_choice_tight",
    "true_positive",
]
