"""Which values reach memory through Inductor: the peak that they make, against that of the compiled code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from testkit.allocator import measured_peak
from testkit.capture import traced_peak

pytestmark = pytest.mark.inductor

SIDE = 256
VALUE = 4 * SIDE * SIDE


def slow_behind_a_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The gate of an MLP, which its backward reads again."""
    gate = x.sigmoid() * x
    return ((gate * y) @ w).sin() @ w * gate


def cheap_behind_a_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    gate = x + x
    return ((gate * y) @ w).sin() @ w * gate


def many_reads_behind_a_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    gate = x + y * w + x[0] * y[1] - w[2]
    return ((gate * y) @ w).sin() @ w * gate


def slow_beside_a_product(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    gate = x.sigmoid() * x
    return (gate * y) @ ((x @ w) * gate)


def slow_around_a_sum(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """A gate that is normalized, and the gradient of that norm."""
    gate = x.sigmoid() * x
    scale = gate.square().sum(-1, keepdim=True).rsqrt()
    gradient = scale * (y - gate * (y * gate).sum(-1, keepdim=True))
    return torch.cat([(gate * scale) @ w[:, :8], gradient @ w[:, :8]], -1)


def slow_before_one_sum(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    product, gate = y @ w, x.sigmoid() * x
    return product * (gate * gate.cos()).sum(-1, keepdim=True)


def slow_before_two_sums(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    product, gate = y @ w, x.sigmoid() * x
    return product * gate.cos().sum(-1, keepdim=True) * (gate * y).sum(-1, keepdim=True)


def slow_in_one_loop(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    product, gate = y @ w, x.sigmoid() * x
    return product * (gate * gate.cos())


def concatenated(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    both = torch.cat([x.neg(), y], -1)
    return both.square().sum(-1) + both.mean(-1) + w[0]


def _padded(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (0, SIDE))


def short_before_a_larger(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return _padded((x * y).cos())


def long_before_a_larger(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    for _ in range(30):
        x = (x * y).cos()
    return _padded(x)


def many_reads_before_a_larger(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    for i in range(13):
        x = x + y[i]
    return _padded(x)


def read_again_on_the_way_to_a_larger(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    gate = x.sigmoid()
    return _padded(gate * y) + _padded(gate)


def slow_and_broadcast(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return x.sigmoid() * y[:2, :1, None]


def cheap_and_broadcast(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (x + w) * y[:2, :1, None]


def few_terms(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    pairs = (x * y).unflatten(1, (2, -1)).sum(1)
    return w[:, : SIDE // 2] + pairs.sum(0)


def written_at_indices(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.index_put(torch.zeros_like(x), (torch.arange(SIDE),), y * w, accumulate=True)


@pytest.mark.parametrize(
    ("fn", "values"),
    [
        (slow_behind_a_product, 3),
        (cheap_behind_a_product, 2),
        (many_reads_behind_a_product, 3),
        (slow_beside_a_product, 3),
        (slow_around_a_sum, 3),
        (slow_before_one_sum, 2),
        (slow_before_two_sums, 2),
        (slow_in_one_loop, 1),
        (concatenated, 2),
        (short_before_a_larger, 2),
        (long_before_a_larger, 3),
        (many_reads_before_a_larger, 3),
        (read_again_on_the_way_to_a_larger, 3),
        (slow_and_broadcast, 3),
        (cheap_and_broadcast, 2),
        (few_terms, 0.5),
        (written_at_indices, 1),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_the_peak_of_the_compiled_code(fn: Callable[..., Tensor], values: float) -> None:
    """values: of [SIDE, SIDE], at the peak."""
    told = traced_peak(lambda *xs: [fn(*xs)], *[(SIDE, SIDE)] * 3, fused=True)
    inputs = [torch.randn(SIDE, SIDE) for _ in range(3)]
    compiled = torch.compile(fn, dynamic=False)
    with torch.no_grad():
        compiled(*inputs)
        measured = measured_peak(lambda: compiled(*inputs), nn.Module())
    assert told == pytest.approx(values * VALUE, rel=0.02)
    assert measured == pytest.approx(told, rel=0.02)
