"""The table of axis rules: op -> how it carries axes. An op without a rule is a mixer.

Each family is a dict in its own module; `TABLE` is their union, `flow_of` the lookup.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from mstc.graph.places import Flow
from mstc.graph.rules.attention import ATTENTION_RULES
from mstc.graph.rules.call import Call, Rule
from mstc.graph.rules.draws import DRAW_RULES
from mstc.graph.rules.index import INDEX_RULES
from mstc.graph.rules.matmul import MATMUL_RULES
from mstc.graph.rules.pointwise import POINTWISE_RULES, is_pointwise, pointwise
from mstc.graph.rules.reduce import REDUCE_RULES
from mstc.graph.rules.shape import SHAPE_RULES
from mstc.graph.sizes import can_evaluate, shape_of, size

TABLE: dict[object, Rule] = {
    **POINTWISE_RULES,
    **SHAPE_RULES,
    **MATMUL_RULES,
    **REDUCE_RULES,
    **INDEX_RULES,
    **ATTENTION_RULES,
    **DRAW_RULES,
}

__all__ = ["TABLE", "Call", "Rule", "flow_of", "rule_of"]


def rule_of(target: object) -> Rule | None:
    """The rule of an op, or None: an op that nothing is known of."""
    found = TABLE.get(target)
    if found is None and is_pointwise(target):
        return pointwise
    return found


def flow_of(node: fx.Node) -> Flow | None:
    """How this call carries axes; None where the op has no rule or its rule does not cover these arguments.

    A float that is known at run time only is nothing that a body could take, nor is a size that nothing here computes.
    """
    rule = rule_of(node.target)
    if rule is None or not all(map(_can_enter_body, (node, *node.all_input_nodes))):
        return None
    return rule(Call(node))


def _can_enter_body(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return all(map(can_evaluate, shape_of(value)))
    return not isinstance(value, torch.SymFloat) and (not isinstance(value, torch.SymInt) or can_evaluate(size(value)))
