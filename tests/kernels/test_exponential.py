"""exp written out: its accuracy, eagerly and compiled, and what it does at the ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from mstc import compat
from mstc.kernels.selective_scan.exponential import exp


def units_off(got: Tensor, x: Tensor) -> float:
    """How far at most, in units in the last place of float32."""
    exact = x.double().exp()
    unit = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    return float(((got.double() - exact).abs() / unit).max())


def compiled(x: Tensor) -> Callable[[Tensor], Tensor]:
    body = compat.compile_for(lambda x: (exp(x),), [x])
    return lambda x: body(x)[0]


@pytest.mark.parametrize("form", ["eager", "compiled"])
def test_two_units_at_most(form: str) -> None:
    x = torch.cat([torch.linspace(-87.3, 88.3, 1_000_000), torch.linspace(-1, 0, 500_000)])
    assert units_off((exp if form == "eager" else compiled(x))(x), x) < 2


def test_at_the_ends() -> None:
    x = torch.tensor([0.0, -0.0, -200.0, -torch.inf, 89.0, torch.inf, torch.nan])
    least = 2.0**-126
    expected = torch.tensor([1.0, 1.0, least, least, torch.inf, torch.inf, torch.nan])
    for form in (exp, compiled(x)):
        torch.testing.assert_close(form(x), expected, rtol=1e-5, atol=0, equal_nan=True)


def test_other_dtypes_take_torchs() -> None:
    x = torch.linspace(-800, 1, 100, dtype=torch.float64)
    assert torch.equal(exp(x), x.exp())


def test_no_call_between_the_registers() -> None:
    x = torch.zeros(64)
    _, code = run_and_get_code(lambda: compat.compile_for(lambda x: (exp(x),), [x]))
    assert "exp()" not in code[0]
    assert "loadu" in code[0], "not vectorized"
