"""Graphs in normal form through Inductor, whose decompositions are free to lay values out otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

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
