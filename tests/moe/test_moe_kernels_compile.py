"""Triton kernels compile for a GPU that need not be there: no driver, no device, only the package.

Options are those that a launch on such a GPU would use.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the package triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"
)

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that a block of threads may use on Ampere, Hopper and Blackwell, in bytes."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}
"""What a product on the tensor cores reads like."""

EXPERT_OPTIONS = {
    "BLOCK_E": 128,
    "BLOCK_N": 64,
    "BLOCK_K": 64,
    "PRECISION": "ieee",
    "UPCAST": False,
}
SHAPE = {"GATED": True, "ACTIVATION": "swiglu", "BLOCK_M": 128, **EXPERT_OPTIONS}
KERNELS: dict[str, dict[str, Any]] = {
    "up_kernel": {**SHAPE, "KEEP": True, "BIAS": True},
    "rows_kernel": {**EXPERT_OPTIONS, "BLOCK_M": 128, "SCALED": True},
    "hidden_grad_kernel": {**SHAPE, "SCALED": True},
    "outer_kernel": {**EXPERT_OPTIONS, "BLOCK_M": 64},
    "sum_kernel": {"BLOCK": 1024},
}
INDICES = {"source", "left_source", "right_source", "counts", "rows_by_token", "start_of_token"}
FLOATS = {"grad_scale", "unit", "affinity", "norm"}
POINTERS = {
    *("x", "up", "down", "hidden", "active", "left", "right", "weight", "scale", "out", "grad"),
    *("grad_hidden", "rows", "bias"),
}


def signature(kernel: Any, constants: dict[str, Any], element: str) -> dict[str, str]:
    """Type of every argument, by its name."""
    kinds: dict[str, str] = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in INDICES:
            kinds[name] = "*i64"
        elif name in FLOATS:
            kinds[name] = "*fp32"
        else:
            kinds[name] = f"*{element}" if name in POINTERS else "i32"
    if "affinity" in kinds:
        kinds |= {"weight": "*fp32", "expert": "*i64", "valid": "*u8", "floor": "fp32"}
    return kinds


def compiled(
    kernel: Any, constants: dict[str, Any], element: str, capability: int, **options: Any
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=kernel, signature=signature(kernel, constants, element), constexprs=constants
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_expert_kernels_compile(name: str, element: str, capability: int) -> None:
    from etr.moe.kernels import triton_experts

    constants = dict(KERNELS[name])
    if element == "fp32" and "BLOCK_K" in constants:
        constants["BLOCK_K"] = 32
    options = {"num_warps": 8 if constants.get("BLOCK_M") == 128 else 4, "num_stages": 3}
    found = compiled(getattr(triton_experts, name), constants, element, capability, **options)
    assert found.asm["cubin"]
    assert found.metadata.shared <= SHARED_BYTES[capability]
    if element == "bf16" and "PRECISION" in constants:
        assert TENSOR_CORES[capability] in found.asm["ptx"]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_affinity_kernel_compiles(weighted: bool, element: str, capability: int) -> None:
    from etr.moe.kernels.triton_affinity import affinity_kernel

    constants = {"TOP_K": 8, "WEIGHTED": weighted, "BLOCK_T": 16, "BLOCK_E": 64, "BLOCK_D": 64}
    found = compiled(affinity_kernel, constants, element, capability, num_warps=4)
    assert found.asm["cubin"]
    assert found.metadata.shared <= SHARED_BYTES[capability]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says nothing where there is a device")
def test_compiling_needs_no_device() -> None:
    assert not torch.cuda.is_initialized()
