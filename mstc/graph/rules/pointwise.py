"""Pointwise ops: every index of the result reads the same index of each operand, broadcast."""

from __future__ import annotations

import torch

from mstc import compat
from mstc.graph.places import Flow
from mstc.graph.rules.call import Call, Rule, broadcast_map

aten = torch.ops.aten


def is_pointwise(target: object) -> bool:
    """An op that PyTorch tags pointwise, draws no random numbers and writes nothing."""
    return (
        isinstance(target, compat.OpOverload)
        and torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not target._schema.is_mutable
    )


def pointwise(call: Call) -> Flow | None:
    rank = len(call.result)
    if any(len(s) > rank for s in call.shapes):
        return None
    return call.flow(*(broadcast_map(len(s), rank) for s in call.shapes))


# Pointwise, but not tagged so.
POINTWISE_RULES: dict[object, Rule] = {
    **dict.fromkeys(
        (
            aten.masked_fill.Tensor,  # its value has no dimension
            aten.fill.Scalar,
            aten.fill.Tensor,
            aten.__and__.Tensor,
            aten.__and__.Scalar,
            aten.__or__.Tensor,
            aten.__or__.Scalar,
            aten.__xor__.Tensor,
            aten.__xor__.Scalar,
            aten._to_copy.default,
            aten.to.dtype,
            aten.alias.default,
            aten.broadcast_tensors.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.copy.default,
            aten.detach.default,
            aten.lift_fresh_copy.default,
            aten.floor_divide.default,
            aten.floor_divide.Scalar,
            aten.true_divide.Tensor,
            aten.type_as.default,
            aten.where.ScalarOther,
            aten.where.ScalarSelf,
            aten.where.Scalar,
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.empty_like.default,
            aten.leaky_relu.default,  # tagged since torch 2.13
            aten.relu6.default,
            aten.hardswish.default,
            aten.selu.default,
            aten.celu.default,
            aten.log_sigmoid.default,
            aten.square.default,
            aten.clip.default,
            # Random: they keep their order, so no region takes them unless what they draw is drawn outside.
            aten.dropout.default,
            aten.bernoulli.p,
        ),
        pointwise,
    ),
}
