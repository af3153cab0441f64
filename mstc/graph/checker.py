"""What must hold of a graph in normal form; run after every pass."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from mstc import compat

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def check(gm: fx.GraphModule) -> None:
    """Assert the normal form (see `mstc.graph.normal_form`); a failure is a bug of the pass that ran last."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        if node.op in ("call_method", "call_module"):
            raise AssertionError(f"{node.name}: {node.op} in a normal form")
        if node.op == "call_function":
            assert isinstance(node.target, compat.OpOverload) or node.target is operator.getitem or _on_sizes(node), (
                f"{node.name}: {node.target} is neither an operator nor getitem nor arithmetic on sizes"
            )
        if node.op in ("call_function", "placeholder", "get_attr"):
            assert "val" in node.meta, f"{node.name} has no value"
        assert not any(isinstance(a, _SYMBOLIC) for a in compat.tree_leaves((node.args, node.kwargs))), (
            f"{node.name} is given a size that no node computes"
        )
        assert not compat.is_grad_mode_switch(node), f"{node.name} switches the grad mode"


def _on_sizes(node: fx.Node) -> bool:
    modules = ("_operator", "operator", "math", "torch", "torch.fx.experimental")
    return node.target is round or getattr(node.target, "__module__", "") in modules
