"""Block affinity in one pass: the plain form's values and derivatives, whatever asks for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from etr.moe.kernels import block_affinity as module
from etr.moe.kernels.block_affinity import block_affinity, block_affinity_plain

E = 4
FRAMES = ["fixed", "learned"]
Affinity = Callable[[Tensor, Tensor | None, int], Tensor]


def vectors(frame: str, hidden_size: int, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return None if frame == "fixed" else torch.randn(hidden_size, dtype=dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, the last block smaller."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 7 * 64)


@pytest.mark.usefixtures("small_blocks", "nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [1, 8, 64])
@pytest.mark.parametrize("frame", FRAMES)
def test_values_and_gradients_equal_the_plain_form(
    frame: str, num_experts: int, dtype: torch.dtype
) -> None:
    x = torch.randn(50, 64).to(dtype)
    weight = vectors(frame, 64, torch.float32)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.randn(50, num_experts, dtype=wanted)
    found = []
    for function in (block_affinity, block_affinity_plain):
        leaf = x.clone().requires_grad_()
        vector = None if weight is None else weight.to(wanted).requires_grad_()
        affinity = function(leaf, vector, num_experts)
        assert affinity.dtype == wanted
        affinity.backward(upstream)
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        found.append([affinity.detach(), leaf.grad] + ([] if vector is None else [vector.grad]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    step = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(found[0][1], found[1][1], atol=step, rtol=step)
    if weight is not None:
        torch.testing.assert_close(found[0][2], found[1][2], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("frame", FRAMES)
def test_a_tokens_affinity_depends_on_nothing_around_it(frame: str) -> None:
    """Bit for bit: equal tokens tie wherever they stand, and a batch may be split."""
    x = torch.randn(5, 64).repeat(9, 1).to(torch.bfloat16)
    weight = vectors(frame, 64, torch.float32)
    whole = block_affinity(x, weight, 8)
    assert torch.equal(whole, whole[:5].repeat(9, 1))
    assert torch.equal(torch.cat([block_affinity(t[None], weight, 8) for t in x]), whole)


@pytest.mark.parametrize("frame", FRAMES)
def test_strided_tokens_and_no_tokens(frame: str) -> None:
    weight = vectors(frame, 8)
    x = torch.randn(8, 6, dtype=torch.float64).T.requires_grad_()
    found = block_affinity(x, weight, E)
    torch.testing.assert_close(found, block_affinity_plain(x, weight, E))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    (wanted,) = torch.autograd.grad(block_affinity_plain(x, weight, E).sum(), x)
    torch.testing.assert_close(gradient, wanted)
    none = torch.zeros(0, 8, requires_grad=True)
    leaf = None if weight is None else weight.float().requires_grad_()
    block_affinity(none, leaf, E).sum().backward()
    assert none.grad is not None
    assert leaf is None or (leaf.grad is not None and not leaf.grad.any())


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-13, 1e-11, 1e15])
@pytest.mark.parametrize("frame", FRAMES)
def test_gradients_around_the_floor_equal_autograd(frame: str, size: float) -> None:
    x, weight = torch.randn(6, 8) * size, vectors(frame, 8, torch.float32)
    upstream, found = torch.randn(6, E), []
    for function in (block_affinity, block_affinity_plain):
        leaf = x.clone().requires_grad_()
        function(leaf, weight, E).backward(upstream)
        found.append(leaf.grad)
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-30)


def test_a_zero_block_vector_has_finite_gradients() -> None:
    x, weight = torch.randn(6, 8), torch.randn(8)
    weight[:2] = 0
    found = []
    for function in (block_affinity, block_affinity_plain):
        leaf = weight.clone().requires_grad_()
        function(x, leaf, E)[:, 1:].square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(found[0], found[1])


def test_gradcheck_once_twice_and_forwards() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: block_affinity(x, None, E), (x,), check_forward_ad=True)
    assert gradcheck(lambda x, w: block_affinity(x, w, E), (x, weight), check_forward_ad=True)
    assert gradgradcheck(lambda x: block_affinity(x, None, E), (x,))
    assert gradgradcheck(lambda x, w: block_affinity(x, w, E), (x, weight))


def transforms() -> dict[str, Callable[..., Any]]:
    """Each: (affinity, x [T, H], batch of x, weight or None, upstream) -> tensors."""

    def loss(f: Affinity, w: Tensor | None, g: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: (f(x, w, E) * g).sum()

    def dual(f: Affinity, x: Tensor, many: Tensor, w: Tensor | None, g: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x * x), w, E)).tangent

    return {
        "vmap": lambda f, x, many, w, g: vmap(lambda x: f(x, w, E))(many),
        "vmap_last": lambda f, x, many, w, g: vmap(lambda x: f(x, w, E), 2)(many.movedim(0, 2)),
        "grad": lambda f, x, many, w, g: grad(loss(f, w, g))(x),
        "vmap_grad": lambda f, x, many, w, g: vmap(grad(loss(f, w, g)))(many),
        "grad_vmap": lambda f, x, many, w, g: grad(
            lambda x: (vmap(lambda x: f(x, w, E))(x) * g).sum()
        )(many),
        "jvp": lambda f, x, many, w, g: jvp(lambda x: f(x, w, E), (x,), (x * x,)),
        "jacrev": lambda f, x, many, w, g: jacrev(lambda x: f(x, w, E))(x),
        "jacfwd": lambda f, x, many, w, g: jacfwd(lambda x: f(x, w, E))(x),
        "hessian": lambda f, x, many, w, g: hessian(loss(f, w, g))(x),
        "dual": dual,
    }


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("name", transforms())
def test_function_transforms_equal_those_of_the_plain_form(name: str, frame: str) -> None:
    x, many = torch.randn(5, 8).double(), torch.randn(3, 5, 8).double()
    arguments = (x, many, vectors(frame, 8), torch.randn(5, E).double())
    transform = transforms()[name]
    got, want = (transform(f, *arguments) for f in (block_affinity, block_affinity_plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x, w, many: vmap(lambda w: f(x, w, E))(many),
        lambda f, x, w, many: vmap(lambda x, w: f(x, w, E))(x.expand(3, -1, -1), many),
        lambda f, x, w, many: grad(lambda w: f(x, w, E).square().sum())(w),
        lambda f, x, w, many: vmap(grad(lambda w: f(x, w, E).square().sum()))(many),
        lambda f, x, w, many: jvp(lambda x, w: f(x, w, E), (x, w), (x * x, w * w)),
        lambda f, x, w, many: hessian(lambda w: f(x, w, E).square().sum())(w),
    ],
)
def test_function_transforms_of_the_block_vectors(transform: Callable[..., Any]) -> None:
    x, w, many = (torch.randn(*size).double() for size in ((5, 8), (8,), (3, 8)))
    got, want = (transform(f, x, w, many) for f in (block_affinity, block_affinity_plain))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("frame", FRAMES)
def test_it_compiles_as_one_graph(frame: str) -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(5, 8, requires_grad=True), vectors(frame, 8, torch.float32)
    compiled = torch.compile(block_affinity, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, weight, E), block_affinity(x, weight, E)
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("frame", FRAMES)
def test_half_precision_tokens_are_not_copied_to_float32(frame: str) -> None:
    """What backward keeps is x itself and numbers per token and expert."""
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    weight, kept = vectors(frame, 256, torch.float32), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block_affinity(x, weight, E)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
