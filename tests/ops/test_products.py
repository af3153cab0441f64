"""Products in float32 by oneDNN: what PyTorch's give, up to rounding, and only where they are faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mstc import compat
from mstc.ops import products
from testkit.allocator import measured_peak

needs_onednn = pytest.mark.skipif(
    compat.onednn_product() is None, reason="oneDNN's product needs AVX-512 and a Linux build of PyTorch"
)

PACKED_BYTES = products.packed_bytes
Calls = list[tuple[int, ...]]


@pytest.fixture
def calls() -> Any:
    """Every product that oneDNN is given, as rows, inner size and columns; it counts as faster for any size."""
    plain, found = compat.onednn_product(), []

    def noting(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        found.append((a.shape[-2], a.shape[-1], b.shape[-1]))
        assert plain is not None
        plain(out, a, b, add)

    with (
        mock.patch.object(compat, "onednn_product", return_value=noting),
        mock.patch.object(products, "onednn_is_faster", return_value=True),
        mock.patch.object(products, "FLOPS_PER_THREAD", 0),
        mock.patch.object(products, "packed_bytes", return_value=0),
        mock.patch.object(products, "SMALLEST_SIDE", 1),
    ):
        yield found


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def _laid_out(x: Tensor, transposed: bool) -> Tensor:
    """The same values, in the memory of their transpose where that is asked for."""
    return x.mT.contiguous().mT if transposed else x


def _poisoned(*shape: int, transposed: bool = False) -> Tensor:
    return _laid_out(torch.full(shape, torch.nan), transposed)


def _error(x: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference from the result in float64, relative to that result's."""
    return float((x.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


SHAPES = [(1, 1, 1), (3, 5, 7), (16, 16, 16), (64, 33, 65), (127, 256, 31), (257, 1, 40), (2, 700, 3)]


@needs_onednn
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
def test_products_of_matrices(shape: tuple[int, int, int], transposed: tuple[int, int, int], calls: Calls) -> None:
    m, k, n = shape
    left, right, result = map(bool, transposed)
    a, b = _laid_out(_random(m, k), left), _laid_out(_random(k, n), right)
    out = _poisoned(m, n, transposed=result)
    assert products.mm(a, b, out=out) is out
    assert _error(out, a.double() @ b.double()) < 1e-6
    total, before = _laid_out(_random(m, n), result), _random(m, n)
    assert products.addmm(total, a, b, out=total) is total
    assert _error(total, before + a.double() @ b.double()) < 1e-6
    assert len(calls) == 2


@needs_onednn
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_batches(transposed: bool, calls: Calls) -> None:
    a, b = _laid_out(_random(3, 20, 33), transposed), _laid_out(_random(3, 33, 17), transposed)
    out = products.bmm(a, b, out=_poisoned(3, 20, 17, transposed=transposed))
    assert _error(out, a.double() @ b.double()) < 1e-6 and len(calls) == 1


@needs_onednn
@pytest.mark.parametrize("bias", [(9,), (1, 9), (6, 1), (6, 9)])
def test_what_is_added_is_broadcast(bias: tuple[int, ...], calls: Calls) -> None:
    x, a, b = _random(*bias), _random(6, 4), _random(4, 9)
    torch.testing.assert_close(products.addmm(x, a, b, out=_poisoned(6, 9)), torch.addmm(x, a, b))
    assert len(calls) == 1


@needs_onednn
def test_nan_and_inf_spread_as_in_pytorch(calls: Calls) -> None:
    a, b = _random(8, 40), _random(40, 24)
    a[2, 3], a[5, 7], b[:, 11] = torch.nan, torch.inf, 0.0
    out = products.mm(a, b, out=_poisoned(8, 24))
    torch.testing.assert_close(out, a @ b, equal_nan=True)
    assert len(calls) == 1


SLICE = _random(20, 30)[:, 4:14]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (_random(4, 5, dtype=torch.float64), _random(5, 6, dtype=torch.float64)),
        (_random(4, 5).bfloat16(), _random(5, 6).bfloat16()),
        (SLICE, _random(10, 6)),
        (_random(4, 1).expand(4, 5), _random(5, 6)),
        (_random(0, 5), _random(5, 6)),
        (_random(4, 0), _random(0, 6)),
    ],
    ids=["float64", "bfloat16", "a slice", "expanded", "no rows", "nothing to sum"],
)
def test_what_pytorch_multiplies(a: Tensor, b: Tensor, calls: Calls) -> None:
    out = torch.full((a.shape[0], b.shape[1]), torch.nan, dtype=a.dtype)
    assert torch.equal(products.mm(a, b, out=out), a @ b)
    assert not calls


def test_scaled_sums_are_pytorchs(calls: Calls) -> None:
    x, a, b = _random(4, 6), _random(4, 5), _random(5, 6)
    out = products.addmm(x, a, b, beta=0.5, alpha=2, out=_poisoned(4, 6))
    assert torch.equal(out, torch.addmm(x, a, b, beta=0.5, alpha=2)) and not calls


def test_it_can_be_switched_off(calls: Calls) -> None:
    a, b = _random(4, 5), _random(5, 6)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(products.mm(a, b, out=_poisoned(4, 6)), a @ b)
    assert not calls


@pytest.mark.parametrize("function", [products.mm, products.bmm])
def test_wrong_shapes_are_pytorchs_error(function: Callable[..., Tensor], calls: Calls) -> None:
    with pytest.raises(RuntimeError, match="must|cannot|[Ee]xpected"):
        function(_random(4, 5), _random(6, 7), out=_poisoned(4, 7))
    with pytest.raises(RuntimeError, match="[Ee]xpected|must"):
        function(_random(4, 5)[0], _random(5, 7), out=_poisoned(4, 7))
    assert not calls


@pytest.mark.parametrize("shape", [(64, 64, 64), (1, 4096, 4096), (4096, 4096, 1), (4096, 1, 4096)])
def test_small_products_are_pytorchs(shape: tuple[int, int, int]) -> None:
    """What oneDNN packs for each thread would count beside them."""
    m, k, n = shape
    with (
        mock.patch.object(products, "onednn_is_faster", return_value=True),
        mock.patch.object(compat, "onednn_product", side_effect=AssertionError("was called")),
    ):
        products.mm(_random(m, k), _random(k, n), out=_poisoned(m, n))


PACKED = [(256, 256, 1024), (512, 512, 2048), (1024, 64, 512), (2048, 1024, 4096)]


@needs_onednn
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", PACKED)
def test_what_is_packed(shape: tuple[int, int, int], threads: int) -> None:
    """Of a linear's three products, at the allocator: at most about what is expected."""
    rows, width, columns = shape
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, w, y = _random(rows, width), _random(columns, width), _random(rows, columns)
        for out, a, b in ((y, x, w.t()), (x, y, w), (w, y.t(), x)):
            run = partial(torch.ops.mstc.product, out, a, b, False)
            run()
            assert measured_peak(run, torch.nn.Identity()) <= 1.25 * products.packed_bytes(a, out) + 4096
    finally:
        torch.set_num_threads(before)


def test_products_that_would_be_packed_whole_are_pytorchs(calls: Calls) -> None:
    """The gradient of a narrow weight over many tokens."""
    y, x = _random(4096, 64), _random(4096, 64)
    with mock.patch.object(products, "packed_bytes", PACKED_BYTES):
        products.mm(y.t(), x, out=_poisoned(64, 64))
    assert not calls


@pytest.mark.parametrize(
    ("cpu", "found", "faster"),
    [
        ({"cpu_name": "AMD EPYC 9655"}, torch.mm, True),
        ({"cpu_name": "AMD EPYC 7763"}, None, False),
        ({"cpu_name": "Intel Xeon Platinum 8480"}, torch.mm, False),
        ({}, torch.mm, False),
    ],
    ids=["Zen 5", "Zen 3, without AVX-512", "Intel", "unknown"],
)
def test_which_cpus_gain(cpu: dict[str, object], found: object, faster: bool) -> None:
    with (
        mock.patch.object(torch.cpu, "get_capabilities", return_value=cpu),
        mock.patch.object(torch.backends.mkl, "is_available", return_value=True),
        mock.patch.object(compat, "onednn_product", return_value=found),
    ):
        assert products.onednn_is_faster.__wrapped__() is faster


@needs_onednn
def test_the_op_is_what_its_schema_says() -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.mstc.product.default, (_random(4, 6), _random(4, 5), _random(5, 6), True), test_utils=tests
    )


@needs_onednn
def test_a_flop_counter_sees_it(calls: Calls) -> None:
    from mstc.ops import flops  # noqa: F401  (tells the counter what the op costs)

    a, b = _random(3, 20, 30), _random(3, 30, 40)
    with FlopCounterMode(display=False) as counter:
        products.bmm(a, b, out=_poisoned(3, 20, 40))
    assert counter.get_total_flops() == 2 * 3 * 20 * 30 * 40 and len(calls) == 1


@needs_onednn
def test_compiled_loops_multiply_by_it(calls: Calls) -> None:
    """A head's three products, and those of an MLP with biases, in bodies that Inductor compiles; exact gradients."""
    shapes = {"up": (48, 24), "bias": (48,), "down": (24, 48), "head": (96, 24)}
    x, y = _random(1, 64, 24), torch.arange(64) % 96

    def loss(up: Tensor, bias: Tensor, down: Tensor, head: Tensor) -> Tensor:
        hidden = x.to(up.dtype) + torch.relu(x.to(up.dtype) @ up.t() + bias) @ down.t()
        return torch.nn.functional.cross_entropy((hidden @ head.t())[0], y)

    weights = {name: _random(*shape).requires_grad_() for name, shape in shapes.items()}
    options = {"mini_sequence": {"chunk_tokens": 16}, "lm_head": {"chunk_tokens": 16}}
    with torch.compiler.config.patch(force_disable_caches=True):
        compiled = torch.compile(loss, backend="mstc", options=options)
        compiled(**weights).backward()
    wide = {name: w.detach().double().requires_grad_() for name, w in weights.items()}
    loss(**wide).backward()
    for name, w in weights.items():
        exact = wide[name].grad
        assert exact is not None and w.grad is not None
        assert _error(w.grad, exact) < 2e-6
    assert {(16, 24, 96), (16, 96, 24), (96, 16, 24)} <= set(calls)  # scores, and both gradients of the head


def test_code_is_left_alone_where_nothing_is_gained() -> None:
    from torch._inductor import select_algorithm

    with mock.patch.object(products, "onednn_is_faster", return_value=False), products.fast_products():
        assert not isinstance(select_algorithm.extern_kernels, compat.products._Overlay)
