"""The backend over SonicMoE: what it hands over, against a plain stand-in for the package.

With the package and a GPU that it runs on, tests/gpu runs the real one.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from test_moe_experts_gradients import H, T, gradients, leaves_of, params_of, routed
from torch import Tensor
from torch.nn import functional as F

from etr.moe import EXPERT_BACKENDS
from etr.moe.dispatch import Permute
from etr.moe.experts import sonic


class Kind(enum.Enum):
    SWIGLU = "swiglu"
    RELU_SQ = "relu_sq"
    GELU = "gelu_tanh_approx"


def pairs_one_by_one(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: None,
    w2: Tensor,
    b2: None,
    E: int,
    stream_id: int,
    activation_type: Kind,
    is_inference_mode_enabled: bool = False,
    is_concatenated_gate_up: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the package documents: its layouts, its order of pairs, its result."""
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert bool((token_indices.diff() >= 0).all())
    assert router_scores.dtype == torch.float32
    assert (w1.shape[-1], w2.shape[-1]) == (E, E)
    assert w1.stride(2) > w1.stride(0) > w1.stride(1) == 1
    assert w2.stride(2) > w2.stride(0) > w2.stride(1) == 1
    assert is_concatenated_gate_up
    CALLS.append(activation_type)
    y = [torch.zeros_like(row) for row in x]
    for weight, t, e in zip(router_scores, token_indices.tolist(), expert_indices, strict=True):
        hidden = w1[:, :, e] @ x[t]
        if activation_type is Kind.SWIGLU:
            gate, value = hidden.chunk(2)
            active = F.silu(gate) * value
        else:
            active = F.relu(hidden).square()
        y[t] = y[t] + weight.to(x.dtype) * (w2[:, :, e] @ active)
    return torch.stack(y), expert_indices.bincount(minlength=E)


CALLS: list[Kind] = []


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with the package's names, which computes in float64 too."""
    CALLS.clear()
    modules = {name: ModuleType(name) for name in ("sonicmoe", "sonicmoe.enums")}
    functional = ModuleType("sonicmoe.functional")
    functional.moe_general_routing_inputs = pairs_one_by_one  # type: ignore[attr-defined]
    modules["sonicmoe.enums"].ActivationType = Kind  # type: ignore[attr-defined]
    for name, module in {**modules, "sonicmoe.functional": functional}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sonic, "DTYPES", (torch.float64,))
    monkeypatch.setattr(sonic, "DEVICE_TYPE", "cpu")
    here = dataclasses.replace(EXPERT_BACKENDS["sonic"], unavailable=lambda: None)
    monkeypatch.setitem(EXPERT_BACKENDS, "sonic", here)
    return functional


def run(name: str, x: Tensor, chosen: tuple[Any, Any], params: Any) -> list[Tensor]:
    y = Permute().run(x, *chosen, EXPERT_BACKENDS[name], params)
    torch.manual_seed(7)
    found = gradients(y, torch.randn(y.shape).to(y), x, chosen[0].gate, *leaves_of(params))
    return [y.detach(), *found]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("activation", sonic.ACTIVATION_NAMES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_pairs_reach_the_package_as_it_wants_them(activation: str, top_k: int) -> None:
    x = torch.randn(T, H, dtype=torch.float64).requires_grad_()
    params, chosen = params_of(activation, torch.float64), routed(top_k)
    found, want = (run(name, x, chosen, params) for name in ("sonic", "loop"))
    assert [Kind.SWIGLU if activation == "swiglu" else Kind.RELU_SQ] == CALLS
    for ours, plain in zip(found, want, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)  # float32 combine weights


@pytest.mark.usefixtures("package")
def test_rows_from_other_ranks() -> None:
    counts = torch.tensor([3, 0, 2, 4])
    params = params_of("swiglu", torch.float64)
    rows = torch.randn(9, H, dtype=torch.float64)
    found, want = (EXPERT_BACKENDS[name].run(rows, counts, params) for name in ("sonic", "loop"))
    assert len(CALLS) == 1
    torch.testing.assert_close(found, want)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("activation", "bias", "num_tokens"),
    [("gelu", False, T), ("clamped_swiglu", False, T), ("swiglu", True, T), ("swiglu", False, 0)],
)
def test_what_it_does_not_take_goes_elsewhere(activation: str, bias: bool, num_tokens: int) -> None:
    x = torch.randn(num_tokens, H, dtype=torch.float64).requires_grad_()
    params = params_of(activation, torch.float64, bias=bias)
    chosen = routed(num_tokens=num_tokens)
    found, want = (run(name, x, chosen, params) for name in ("sonic", "loop"))
    assert not CALLS
    for ours, plain in zip(found, want, strict=True):
        torch.testing.assert_close(ours, plain)


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if sonic.why_no_sonic() is None:
        pytest.skip("SonicMoE runs here")
    with pytest.raises(ValueError, match="backend='sonic' cannot run: "):
        Permute().run(
            torch.randn(T, H),
            *routed(),
            EXPERT_BACKENDS["sonic"],
            params_of("swiglu", torch.float32),
        )


def test_an_old_package_is_refused(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sonic.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert sonic.why_no_sonic() is None
    package.moe_general_routing_inputs = lambda x, router_scores: None
    assert "install a later one" in str(sonic.why_no_sonic())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "9.0" in str(sonic.why_no_sonic())
