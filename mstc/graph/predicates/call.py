"""One node's call, with its arguments by position and sizes as expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.predicates.terms import Expr


class Unread(Exception):
    """What stands at a place cannot be told; the value becomes a leaf of its node."""


@dataclass(frozen=True)
class Call:
    """``op`` is the overload packet (``aten.add``), ``args`` all arguments of the schema in its order, defaults filled.

    names: the schema's names for ``args``.
    """

    node: fx.Node
    op: Any
    args: tuple[Any, ...]
    names: tuple[str, ...]

    def get(self, name: str) -> Any:
        """The argument of that name, None where the schema has none."""
        return self.args[self.names.index(name)] if name in self.names else None

    def node_arg(self, position: int) -> fx.Node:
        """The argument at ``position``, which must be a tensor's node."""
        arg = self.args[position]
        if not isinstance(arg, fx.Node):
            raise Unread(f"argument {position} is no tensor")
        return arg


def call_of(node: fx.Node) -> Call | None:
    """The call of an operator, None for any other node."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, compat.OpOverload):
        return None
    schema = target._schema.arguments
    given = {**dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
    args = tuple(given.get(a.name, a.default_value) for a in schema)
    return Call(node, target.overloadpacket, args, tuple(a.name for a in schema))


def is_tensor(node: object) -> bool:
    """Whether an argument is a node with a tensor value."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[Expr, ...]:
    """The sizes of a tensor as expressions."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        raise Unread(f"{node.name} is no tensor")
    return tuple(size(n) for n in value.shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a tensor."""
    value = node.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value.dtype


def size(value: Any) -> Expr:
    """An int, a SymInt, or a node that holds one, as an expression; no guard is added."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        return sympy.sympify(value.node.expr)
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    raise Unread("a size is not an integer")
