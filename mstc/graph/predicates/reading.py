"""What a rule may ask of the reader that applies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.fx as fx

from mstc.graph.predicates.bounds import Box
from mstc.graph.predicates.terms import Expr, Value

Index = tuple[Expr, ...]


@dataclass(frozen=True)
class Leaf:
    """What a leaf's symbol stands for: ``node`` at ``index``."""

    node: fx.Node
    index: Index


@dataclass(frozen=True)
class Run:
    """A leaf numbers the runs of consecutive values of ``symbol``, which is read at ``position``."""

    symbol: Expr
    position: Expr


class Reading(Protocol):
    """A reader, as its rules see it (see `mstc.graph.predicates.reader.Reader`)."""

    box: Box
    leaves: dict[Expr, Leaf]
    runs: dict[Expr, Run]

    def value(self, node: fx.Node, index: Index) -> Value:
        """What stands in ``node`` at ``index``."""

    def leaf(self, node: fx.Node, index: Index, key: object = None) -> Value:
        """The symbol for ``node`` at ``index``, or for ``key`` where that says the same of several nodes."""

    def operand(self, arg: object, index: Index) -> tuple[Value, torch.dtype | None]:
        """What an elementwise op reads from one argument, and its dtype (None: a scalar)."""
