"""Live bytes of small graphs, op by op and fused."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from mstc.graph.live import results_of
from testkit.capture import traced_peak

_ROW = 4 * 64  # bytes of one float32 row of 64


def test_a_chain_holds_two_values() -> None:
    assert traced_peak(lambda x: [x.sin().cos().exp()], (8, 64)) == 2 * 8 * _ROW


def test_a_fused_chain_holds_its_result() -> None:
    assert traced_peak(lambda x: [x.sin().cos().exp()], (8, 64), fused=True) == 8 * _ROW


def test_views_take_no_memory() -> None:
    assert traced_peak(lambda x: [x.sin().view(64, 8).t()], (8, 64)) == 8 * _ROW


def test_a_value_lives_until_its_last_reader() -> None:
    def branches(x: Tensor) -> list[Tensor]:
        a = x.sin()
        return [(a.cos().exp() + a)]

    assert traced_peak(branches, (8, 64)) == 3 * 8 * _ROW


def test_operands_of_a_product_exist_even_where_fused() -> None:
    assert traced_peak(lambda x, w: [x.sin() @ w], (8, 64), (64, 64), fused=True) == 2 * 8 * _ROW


def test_results_of_one_op_lie_beside_what_it_reads_last() -> None:
    assert traced_peak(lambda x: list(x.sin().sort(-1)), (8, 64)) == (1 + 1 + 2) * 8 * _ROW


def test_pieces_of_a_split_are_views() -> None:
    assert traced_peak(lambda x: [x.sin().split(4)[1].cos()], (8, 64)) == (8 + 4) * _ROW


def test_a_fused_kernel_does_not_write_over_what_it_reads_in_another_order() -> None:
    def transposed(x: Tensor, w: Tensor) -> list[Tensor]:
        return [(x @ w).t().clone(memory_format=torch.contiguous_format)]

    assert traced_peak(transposed, (64, 64), (64, 64), fused=True) == 2 * 64 * _ROW


def test_a_fused_kernel_writes_over_what_it_reads_last() -> None:
    assert traced_peak(lambda x, w: [(x @ w).exp()], (8, 64), (64, 64), fused=True) == 8 * _ROW


def test_a_fused_kernel_does_not_write_over_what_another_of_its_results_reads() -> None:
    """``exp`` and ``sin`` read the product in one kernel: neither can be written over it."""

    def two(x: Tensor, w: Tensor) -> list[Tensor]:
        y = x @ w
        return [y.exp(), y.sin()]

    assert traced_peak(two, (8, 64), (64, 64), fused=True) == 3 * 8 * _ROW


def test_a_fused_kernel_writes_over_what_it_reads_after_all_others() -> None:
    """The maxima are needed before the first element of the result can be written."""

    def centred(x: Tensor, w: Tensor) -> list[Tensor]:
        y = x @ w
        return [y - y.amax(-1, keepdim=True)]

    assert traced_peak(centred, (8, 64), (64, 64), fused=True) == 8 * _ROW + 4 * 8


def test_a_pool_hands_out_what_fits_and_keeps_the_rest() -> None:
    def narrow(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
        return [((x @ w) @ v) @ w]

    # 64, 16 and again 64 wide: the third takes the memory of the first; the second is too small to be of use.
    assert traced_peak(narrow, (8, 16), (16, 64), (64, 16)) == 8 * _ROW + 2 * _ROW
    assert traced_peak(narrow, (8, 16), (16, 64), (64, 16), pooled=True) == 8 * _ROW + 2 * _ROW
    assert traced_peak(lambda x: [x[:2].sin().sum() + x], (8, 64)) == 8 * _ROW + 4
    assert traced_peak(lambda x: [x[:2].sin().sum() + x], (8, 64), pooled=True) == (2 + 8) * _ROW + 4


def test_nothing_is_freed_before_a_kernel_is_done() -> None:
    """The first sum is the last reader of ``x @ w``; it goes when the second sum's input is there as well."""

    def sums(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
        y, z = x @ w, x @ v
        return [y.sum(0), (z.t() + 1).clone(memory_format=torch.contiguous_format)]

    assert traced_peak(sums, (64, 64), (64, 64), (64, 64), fused=True) == 3 * 64 * _ROW + _ROW


def test_results_of_results() -> None:
    """As of ``run_and_save_rng_state``, which returns a state and the results of another op."""
    graph = torch.fx.Graph()
    op = graph.call_function(torch.ops.higher_order.run_and_save_rng_state)
    state, both = (graph.call_function(operator.getitem, (op, i)) for i in range(2))
    second = graph.call_function(operator.getitem, (both, 1))
    assert results_of(op) == [op, state, both, second]


def test_a_node_joins_an_earlier_kernel_that_reads_the_same() -> None:
    def apart(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
        y = x @ w
        return [y.sin() @ v, y.cos() @ v]

    def after(x: Tensor, w: Tensor, v: Tensor) -> list[Tensor]:
        y = x @ w
        first = y.sin() @ v
        return [first, (y.cos() + first) @ v]

    shapes = (64, 64), (64, 64), (64, 1)
    assert traced_peak(apart, *shapes, fused=True) == 3 * 64 * _ROW
    assert traced_peak(after, *shapes, fused=True) == 2 * 64 * _ROW + _ROW
