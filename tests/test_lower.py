"""Graphs in normal form through Inductor, whose decompositions are free to lay values out otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from testkit.exactness import chunked, compare


def _heads(x: Tensor, w: Tensor) -> Tensor:
    """[batch, tokens, features] to [batch, heads, tokens, features of one], in the strides of the first."""
    return (x @ w).unflatten(-1, (2, -1)).transpose(1, 2)


@pytest.mark.inductor
@pytest.mark.parametrize("loops", [True, False], ids=["loops", "whole"])
def test_a_view_of_what_inductor_lays_out_otherwise(loops: bool) -> None:
    """``cat`` with an empty operand, as of rotary embeddings over all features, then a batched product."""
    w, head = (nn.Parameter(0.3 * torch.randn(8, n)) for n in (8, 11))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        q = torch.cat([_heads(x, w).sin(), _heads(x, w)[..., 4:]], -1)
        scores = torch.bmm(q.reshape(-1, *q.shape[2:]), q.reshape(-1, *q.shape[2:]).mT).softmax(-1)
        mixed = (scores @ q.reshape(-1, *q.shape[2:])).view_as(q).transpose(1, 2).flatten(2)
        return nn.functional.cross_entropy((mixed @ head).flatten(0, 1), y.flatten())

    options = chunked(3) if loops else {"mini_sequence": False, "lm_head": False, "query_chunks": False}
    inputs = torch.randn(2, 6, 8), torch.randint(11, (2, 6))
    compare(loss, {"w": w, "head": head}, inputs, {**options, "lower": "inductor"}).check(torch.float32)


@pytest.mark.inductor
def test_caches_know_what_runs_again() -> None:
    """One graph without and with a block that its user wants run again: AOTAutograd's cache tells them apart."""

    def block(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w).sin() @ w

    def saved(run: Callable[[Tensor, Tensor], Tensor]) -> int:
        """Bytes that a step through compiled code saves."""
        torch._dynamo.reset()
        options = {"mini_sequence": False, "recompute": {"checkpoints": "keep"}}
        compiled = torch.compile(lambda x, w: run(x, w).cos(), backend="mstc", options=options, dynamic=False)
        found: list[Tensor] = []

        def pack(t: Tensor) -> Tensor:
            found.append(t)
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            compiled(torch.randn(512, 16), torch.randn(16, 16, requires_grad=True)).sum().backward()
        return sum(t.nbytes for t in found)

    with fresh_cache():
        plain = saved(block)
        again = saved(lambda x, w: checkpoint(block, x, w, use_reentrant=False))
        assert saved(block) == plain
    assert again < plain
