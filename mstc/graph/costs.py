"""What one node costs: FLOPs of matrix products (2 per multiply-add) and bytes of values."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.attention import is_attention, share_seen
from mstc.graph.convolution import is_pointwise_convolution
from mstc.graph.einsum import contracted, names_of

aten = torch.ops.aten

# Stands for a size that was never seen.
UNKNOWN_LENGTH = 4096

_MATMULS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
)


def is_heavy(node: fx.Node) -> bool:
    """A matrix product: what chunks must be large enough for, and what recomputation avoids."""
    if node.target is aten.einsum.default:
        return bool(contracted(node))
    return node.target in _MATMULS or is_pointwise_convolution(node)


def factors_of(node: fx.Node) -> tuple[Any, ...]:
    """The factors of a matrix product, behind what is added to it, if anything: two, or more of an einsum."""
    if node.target is aten.einsum.default:
        return tuple(node.args[1])  # type: ignore[arg-type]
    first = 1 if node.target in (aten.addmm.default, aten.baddbmm.default) else 0
    return node.args[first : first + 2]


def matmul_flops(node: fx.Node) -> float:
    """FLOPs of a matrix product, 0 for anything else. Symbolic sizes count by their hint."""
    if not is_heavy(node):
        return 0.0
    if node.target is aten.einsum.default:
        terms, _ = names_of(node)
        shapes = [factor.meta["val"].shape for factor in factors_of(node)]
        sizes = [dict(zip(term, shape, strict=True)) for term, shape in zip(terms, shapes, strict=True)]
        inner = math.prod(max(hint(known[name]) for known in sizes if name in known) for name in contracted(node))
        return 2.0 * numel(node) * inner
    left, right = factors_of(node)
    assert isinstance(left, fx.Node)
    if node.target is aten.convolution.default:
        return 2.0 * numel(node) * hint(right.meta["val"].shape[1])
    inner = hint(left.meta["val"].shape[-1]) if left.meta["val"].dim() else 1
    return 2.0 * numel(node) * inner


def attention_flops(node: fx.Node) -> float:
    """FLOPs of an attention's two products over all pairs of tokens, or those in its window, 0 for anything else.

    A causal mask is not counted off.
    """
    if not is_attention(node):
        return 0.0
    keys = node.args[1]
    assert isinstance(keys, fx.Node)
    query = node.all_input_nodes[0]
    length = hint(keys.meta["val"].shape[-2])
    return 2.0 * length * (numel(query) + numel(node)) * share_seen(node, length)


def is_seen(size: object) -> bool:
    """Whether a size had a value in the call that was captured; else only a run tells."""
    return not isinstance(size, torch.SymInt) or size.node.hint is not None


def hint(size: object) -> int:
    """A number for a size: itself, or the example that a symbolic size was traced with."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if is_seen(size) else UNKNOWN_LENGTH
    return int(size)  # type: ignore[call-overload, no-any-return]


def numel(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(hint(s) for s in value.shape) if isinstance(value, torch.Tensor) else 0


def nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return numel(node) * value.element_size() if isinstance(value, torch.Tensor) else 0


def bytes_of(value: Any) -> int:
    """Bytes that a value takes in memory, 0 for what is no tensor."""
    if not isinstance(value, torch.Tensor):
        return 0
    size = value.element_size()
    for s, stride in zip(value.shape, value.stride(), strict=True):
        size *= hint(s) if not isinstance(stride, int) or stride else 1  # an expanded dimension takes no memory
    return size
