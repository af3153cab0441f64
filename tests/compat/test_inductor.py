"""Code of our own through Inductor: what a block writes and returns, and its threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from mstc import compat


def step(x: Tensor, state: Tensor, out: Tensor, final: Tensor) -> tuple[Tensor, ...]:
    """out = state + x, the state after it twice that; returns its exponential."""
    new = state + x
    out.copy_(new)
    final.copy_(2 * new)
    return (new.exp(),)


def test_a_block_writes_to_its_arguments() -> None:
    body = compat.compile_block(step, [torch.empty(4, 64) for _ in range(4)])
    state, out, rows = torch.zeros(4, 64), torch.empty(8, 64), torch.randn(8, 64)
    expected_state = torch.zeros(4, 64)
    for i in (0, 4):
        expected = expected_state + rows[i : i + 4]
        expected_state = 2 * expected
        final = torch.empty_like(state)
        (returned,) = body(rows[i : i + 4], state, out[i : i + 4], final)
        state = final
        torch.testing.assert_close(out[i : i + 4], expected)
        torch.testing.assert_close(returned, expected.exp())
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_block_has_the_threads_that_it_is_given(threads: int) -> None:
    examples = [torch.empty(64, 4096) for _ in range(4)]
    _, code = run_and_get_code(lambda: compat.compile_block(step, examples, threads))
    assert "inductor_entry_impl" in code[0], "the wrapper is not C++"
    assert ("#pragma omp parallel" in code[0]) == (threads > 1)
