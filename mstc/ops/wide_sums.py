"""Gradients that a body sums over its tokens leave it in float32.

    dL/db = round(sum over chunks of (sum over the chunk's tokens of dy))

A bias or the scale of a norm in half precision gets the sum of all tokens rounded once, as in eager. A body that
rounded each chunk's sum would add an error per chunk, which a float32 accumulator cannot take back.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from mstc.graph.precision import at_least_float32

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims)


def widened(gradient: fx.Node) -> fx.Node:
    """The gradient, or a copy of the sum that it is, seen through views, in at least float32."""
    dtype = at_least_float32(gradient.meta["val"].dtype)
    if dtype is gradient.meta["val"].dtype:
        return gradient
    chain = [gradient]
    while chain[0].target in _VIEWS:
        chain.insert(0, chain[0].all_input_nodes[0])
    if chain[0].target is not aten.sum.dim_IntList:
        return gradient
    copies: dict[fx.Node, fx.Node] = {}
    with gradient.graph.inserting_before(gradient.next):
        for node in chain:
            copies[node] = gradient.graph.node_copy(node, lambda n: copies.get(n, n))
            copies[node].meta["val"] = node.meta["val"].to(dtype)
    copies[chain[0]].update_kwarg("dtype", dtype)
    return copies[gradient]
