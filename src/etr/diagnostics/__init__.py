"""What routing does to tokens and experts: pure functions on tensors."""

from etr.diagnostics.clusters import ClusterRatios, calinski_harabasz, kept_calinski_harabasz
from etr.diagnostics.distributions import (
    AffinityHistogram,
    affinity_histogram,
    load_ecdf,
    mutual_information,
    mutual_information_bias,
)
from etr.diagnostics.similarity import expert_outputs, expert_similarity, token_correlation

__all__ = [
    "AffinityHistogram",
    "ClusterRatios",
    "affinity_histogram",
    "calinski_harabasz",
    "expert_outputs",
    "expert_similarity",
    "kept_calinski_harabasz",
    "load_ecdf",
    "mutual_information",
    "mutual_information_bias",
    "token_correlation",
]
