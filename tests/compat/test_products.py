"""oneDNN's product, bound by hand: found, checked, and bound into compiled code."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor import select_algorithm

from mstc import compat
from mstc.compat import products


def multiply(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    out.copy_(out + a @ b if add else a @ b)


def never_adding(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    out.copy_(a @ b)


def reading_what_was_there(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    out.add_(a @ b)


@pytest.mark.parametrize(
    ("function", "good"), [(multiply, True), (never_adding, False), (reading_what_was_there, False)]
)
def test_what_does_not_multiply_is_told(function: products.Product, good: bool) -> None:
    assert products._is_product(function) is good


def test_the_check_makes_real_tensors() -> None:
    """A backend is called under a fake mode by DDP's optimizer; memory of a fake tensor is none."""
    seen: list[type] = []

    def noting(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        seen.extend(map(type, (out, a, b)))
        multiply(out, a, b, add)

    with compat.FakeTensorMode(), torch.device("meta"):
        assert products._is_product(noting)
    assert set(seen) == {torch.Tensor}


def test_it_is_missing_without_its_instructions_or_its_library(tmp_path: Path) -> None:
    find = products.onednn_product.__wrapped__
    with mock.patch.object(torch.backends.cpu, "get_cpu_capability", return_value="AVX2"):
        assert find() is None
    with mock.patch.object(torch, "__file__", str(tmp_path / "torch" / "__init__.py")):
        assert find() is None
    with mock.patch.object(products, "_SYMBOL", "_ZN2at6native13mkldnn_matmulEv"):
        assert find() is None


def test_other_functions_of_the_namespace_stay() -> None:
    plain: Any = select_algorithm.extern_kernels
    with compat.multiplying_by({"mm": multiply}):
        inside: Any = select_algorithm.extern_kernels
        assert inside.mm is multiply and inside.convolution is plain.convolution
        inside.of_the_test = torch.mul
        assert not hasattr(inside, "nobody_made_this")
    assert select_algorithm.extern_kernels is plain and plain.of_the_test is torch.mul
    del plain.of_the_test
