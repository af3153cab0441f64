"""Random ops that draw without looking at any value: what they draw may be drawn elsewhere."""

from __future__ import annotations

import torch
import torch.fx as fx

from mstc.graph.rules.call import Call

aten = torch.ops.aten

# Values that depend on the shape, layout, dtype and device of the operand only.
BLIND = (
    aten.bernoulli.p,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.uniform.default,
    aten.exponential.default,
    aten.normal_functional.default,
    aten.log_normal.default,
    aten.cauchy.default,
    aten.geometric.default,
)


def drops(node: fx.Node) -> bool:
    """A dropout that draws a mask."""
    if node.target is not aten.dropout.default:
        return False
    call = Call(node)
    return bool(call.arg("train")) and 0 < call.arg("p") < 1 and node.meta["val"].numel() > 0


def draws_mask(node: fx.Node) -> bool:
    """A draw of zeros and ones, or their use in a dropout: what `mstc.passes.draws` takes out of a loop."""
    return drops(node) or node.target is aten.bernoulli.p
