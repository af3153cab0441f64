"""A graph as canonical text: the same for graphs that are equal up to renaming, stable between runs."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.fx as fx


def canonical_text(graph: fx.Graph) -> str:
    """One line per node, names replaced by their order; shapes, strides and dtypes of inputs included."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []

    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(show(v) for v in value) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k}={show(v)}" for k, v in sorted(value.items())) + "}"
        return repr(value)

    for i, node in enumerate(graph.nodes):
        names[node] = f"%{i}"
        described = _describe(node.meta.get("val")) if node.op in ("placeholder", "get_attr") else ""
        target = node.target if node.op == "get_attr" else str(node.target) if node.op == "call_function" else ""
        lines.append(f"%{i} = {node.op} {target} {show(node.args)} {show(dict(node.kwargs))} {described}".rstrip())
    return "\n".join(lines)


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}:{tuple(value.stride())}@{value.device}"
    return repr(value)


def digest(*parts: object) -> str:
    """A short hash of texts and plain values."""
    return hashlib.sha256("\n".join(str(p) for p in parts).encode()).hexdigest()[:16]
