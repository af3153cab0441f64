"""Nodes of a body stand just before the first that reads them; sums that are results stay where they were.

What is made of the same values is then made at once, and a value is in memory no longer than it must. Inductor
orders such graphs in this way too, but puts all results last: a norm's weight gradient, a sum over tokens, would hold
what it adds up till then. That is off for bodies (`mstc.lower`).
"""

from __future__ import annotations

import operator

import torch.fx as fx

from mstc.graph.copies import copy_of
from mstc.graph.fusion import is_reduction
from mstc.graph.views import root_of


def near_readers(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph without random ops and writes, its nodes moved."""
    moved, _ = copy_of(gm)
    seen: set[fx.Node] = set()
    for node in reversed(moved.graph.nodes):
        seen.add(node)
        for operand in node.all_input_nodes:
            stays = node.op == "output" and is_reduction(root_of(operand))
            moves = operand.op == "call_function" and operand.target is not operator.getitem
            if moves and not stays and seen.issuperset(operand.users):
                node.prepend(operand)
    moved.recompile()
    return moved
