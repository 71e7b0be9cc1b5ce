"""Backend over SonicMoE, where that is installed: its entry point for pairs of any number a token.

Its kernels (arXiv 2512.14080) run on GPUs of Hopper's kind and later, in half precision, for
experts without biases. Everything else goes to the backend `grouped_mm`.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etr.moe.experts.weights import ExpertParams
from etr.moe.rows import DispatchHandle, expert_of_row

DEVICE_TYPE = "cuda"
DTYPES = (torch.bfloat16, torch.float16)
ACTIVATION_NAMES = {"swiglu": "SWIGLU", "relu2": "RELU_SQ"}
"""Ours in its terms. Its GELU is the tanh approximation, so not ours."""
_HOPPER = 9


def why_no_sonic() -> str | None:
    """Why SonicMoE cannot run on this machine, or None."""
    if importlib.util.find_spec("sonicmoe") is None:
        return "the package sonicmoe is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < _HOPPER:
        return "there is no CUDA device of compute capability 9.0 or later"
    if "is_concatenated_gate_up" not in inspect.signature(_entry()).parameters:
        return "this sonicmoe wants gate and value rows in turn; install a later one"
    return None


def sonic_runs(params: ExpertParams, num_rows: int) -> bool:
    """Whether the kernels take these experts, and there is any row at all."""
    return (
        params.up.device.type == DEVICE_TYPE
        and params.up.dtype in DTYPES
        and params.activation in ACTIVATION_NAMES
        and params.up_bias is None
        and params.down_bias is None
        and num_rows > 0
    )


@dataclass(frozen=True)
class Pairs:
    """Kept pairs in token order, as SonicMoE wants them.

    Args:
        token: int64 [R], ascending.
        expert: int64 [R].
        weight: combine weights, float [R].
    """

    token: Tensor
    expert: Tensor
    weight: Tensor

    @classmethod
    def of(cls, handle: DispatchHandle) -> Pairs:
        """Pairs of a ragged plan, whose rows lie in expert order."""
        num_rows = handle.token_of_row.shape[0]
        row = handle.rows_by_token[:num_rows]
        expert = expert_of_row(handle.num_tokens_per_expert, num_rows)[row]
        return cls(handle.token_of_row[row], expert, handle.weight_of_row[row])

    @classmethod
    def of_rows(cls, rows: Tensor, num_tokens_per_expert: Tensor) -> Pairs:
        """Rows as tokens of one expert each, in expert order."""
        token = torch.arange(rows.shape[0], device=rows.device)
        expert = expert_of_row(num_tokens_per_expert, rows.shape[0])
        return cls(token, expert, rows.new_ones(rows.shape[0]))


def run_sonic(x: Tensor, pairs: Pairs, params: ExpertParams) -> Tensor:
    """Weighted sum of each token's experts.

    Args:
        x: tokens [T, H].
        pairs: of these tokens.
        params: weights of the dtype of `x`, without biases.
    Returns:
        [T, H]; 0 for a token without pairs.
    """
    enums = importlib.import_module("sonicmoe.enums")
    kind = getattr(enums.ActivationType, ACTIVATION_NAMES[params.activation])
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    y: Tensor = _entry()(
        x.contiguous(),
        pairs.weight.float(),
        pairs.token.int(),
        pairs.expert.int(),
        params.up.contiguous().permute(1, 2, 0),  # the expert last in shape, first in memory
        None,
        params.down.contiguous().permute(1, 2, 0),
        None,
        params.up.shape[0],
        stream,
        kind,
        is_inference_mode_enabled=not torch.is_grad_enabled(),
        is_concatenated_gate_up=True,
    )[0]
    return y


def _entry() -> Callable[..., Any]:
    found: Callable[..., Any] = importlib.import_module(
        "sonicmoe.functional"
    ).moe_general_routing_inputs
    return found
