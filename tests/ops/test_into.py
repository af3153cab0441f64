"""Bodies that write into the whole tensors: which results can, and that the numbers stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.ops import program as programs
from mstc.ops.body import BackwardBody, Factors, Value
from mstc.ops.into import writable, writable_results, write_into
from mstc.ops.pieces import Cut
from testkit.exactness import chunked, compare
from testkit.tiny import Tiny, inputs, step

CPU = torch.device("cpu")


def value(cut: Cut | None) -> Value:
    return Value((2, 6, 3), (0, 1, 2), torch.float32, CPU, cut)


SLICE, SCATTERED = value(Cut(1, 1, 1)), value(Cut(1, 2, 1))


def test_a_slice_can_be_written_and_a_factor_of_a_dimension_cannot() -> None:
    assert writable([SLICE, SCATTERED, value(None)]) == (0,)


def test_a_result_with_two_takers_is_returned() -> None:
    gm = torch.fx.symbolic_trace(lambda x: [x, x, x])
    factors = (Factors(0, 2, 1, False),)
    joint = BackwardBody(gm, (), (), (), (), {0: 0, 1: 1, 2: 3}, {}, factors, (4,))
    found = writable_results(joint, [SLICE, SLICE, SCATTERED], [SLICE])
    assert found == {0: SLICE, 4: SLICE}, "position 1 is a factor too, and 3 belongs to a scattered tensor"


def test_results_are_written_and_none_is_returned_for_them() -> None:
    gm = torch.fx.symbolic_trace(lambda x: [x + 1, x * 2, x - 1])
    for n in gm.graph.nodes:
        n.meta["val"] = None
    x, first, last = torch.arange(3.0), torch.empty(3), torch.empty(3)
    found = write_into(gm, [0, 2])(x, first, last)
    assert found[0] is found[2] is None
    assert torch.equal(found[1], x * 2) and torch.equal(first, x + 1) and torch.equal(last, x - 1)


@pytest.mark.inductor
def test_written_through_inductor() -> None:
    """Odd tails, a batch of two (whose slices have gaps between them), and all three kinds of bodies."""
    model = Tiny(dtype=torch.float32)
    result = compare(
        step(model), dict(model.named_parameters()), inputs(2, 23, dtype=torch.float32), chunked(7, 5, "inductor")
    )
    result.check(torch.float32)
    made = [p for p in programs._programs.values() if p.count > 1]
    assert any(p.writes for p in made) and any(p.backward and p.backward.writes for p in made)
    assert any(p.backward and p.backward.values and p.backward.writes for p in made)


@pytest.mark.inductor
def test_gradients_and_outputs_of_a_head_are_written() -> None:
    def fn(x: Tensor, w: Tensor, labels: Tensor) -> Any:
        logits = F.linear(x, w)
        return F.cross_entropy(logits, labels), logits.argmax(-1)

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator, requires_grad=True) for s in ((40, 8), (96, 8)))
    labels = torch.randint(96, (40,), generator=generator)
    fast = torch.compile(fn, backend="mstc", options=chunked(7, 5, "inductor"))
    loss, best = fast(x, w, labels)
    expected, right = fn(x, w, labels)
    assert torch.equal(best, right)
    got, wanted = (torch.autograd.grad(v, (x, w)) for v in (loss, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)
