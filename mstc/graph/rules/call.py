"""One call of an op as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.places import DimFlow, Flow, Lost
from mstc.graph.sizes import Size, shape_of

Rule = Callable[["Call"], "Flow | None"]
Map = tuple["int | Lost", ...]


class Call:
    """A node with its arguments by name, its tensor operands in order of appearance, and its result's shape."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.target: Any = node.target
        self.operands: list[fx.Node] = operands_of(node)

    def arg(self, name: str, default: Any = None) -> Any:
        """The argument ``name`` of the op's schema as it was given, or its default."""
        for i, declared in enumerate(self.target._schema.arguments):
            if declared.name != name:
                continue
            if not declared.kwarg_only and i < len(self.node.args):
                return self.node.args[i]
            if name in self.node.kwargs:
                return self.node.kwargs[name]
            return declared.default_value if declared.has_default_value() else default
        return default

    def shape(self, operand: int = 0) -> tuple[Size, ...]:
        return shape_of(self.operands[operand].meta["val"])

    @property
    def shapes(self) -> tuple[tuple[Size, ...], ...]:
        return tuple(self.shape(i) for i in range(len(self.operands)))

    @property
    def result(self) -> tuple[Size, ...]:
        """Shape of the result, of the first one where there are several."""
        value = self.node.meta["val"]
        return shape_of(value if isinstance(value, torch.Tensor) else value[0])

    def dim(self, name: str = "dim", operand: int = 0, default: int | None = None) -> int:
        """A dimension argument, counted from the front."""
        value = self.arg(name, default)
        return int(value) % max(len(self.shape(operand)), 1)

    def flow(self, *maps: Map, repeats: bool = False) -> DimFlow:
        return DimFlow(tuple(maps), self.shapes, self.result, repeats)


def operands_of(node: fx.Node) -> list[fx.Node]:
    """Tensor inputs in order of appearance, repeated where an input appears twice."""
    found: list[fx.Node] = []

    def visit(value: Any) -> None:
        if isinstance(value, fx.Node):
            if isinstance(value.meta.get("val"), torch.Tensor):
                found.append(value)
        elif isinstance(value, (list, tuple)):
            for v in value:
                visit(v)

    for value in (*node.args, *node.kwargs.values()):
        visit(value)
    return found


def broadcast_map(rank: int, result_rank: int) -> Map:
    """Dimensions aligned from the right."""
    return tuple(d + result_rank - rank for d in range(rank))


def mixing(rank: int, *dims: int) -> Map:
    """The identity but for dimensions that the op mixes."""
    return without(rank, dict.fromkeys(dims, Lost.MIXED), removed=False)


def without(rank: int, lost: dict[int, Lost], removed: bool) -> Map:
    """The identity but for ``lost`` dimensions, which leave the result where ``removed``."""
    result: list[int | Lost] = []
    position = 0
    for d in range(rank):
        if d in lost:
            result.append(lost[d])
            position += 0 if removed else 1
        else:
            result.append(position)
            position += 1
    return tuple(result)
