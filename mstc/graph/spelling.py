"""Ops spelt in others that say the same, with a derivative, and that axis rules see through."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.not_normal import NotNormalError
from mstc.graph.rules.call import operands_of
from mstc.graph.sizes import same, shape_of

aten = torch.ops.aten

# What a call reads of its first operand is a dtype and a device; arguments behind it, and the op that reads nothing.
_MADE = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}


def spell_out(gm: fx.GraphModule) -> None:
    """Spell copies, writes to strided views, repetitions and tensors made from nothing."""
    editor = Editor(gm)
    _spell_copies(editor)
    _spell_strided_writes(editor)
    _spell_repetitions(editor)
    _spell_new(editor)


def _spell_repetitions(editor: Editor) -> None:
    """A ``repeat`` of dimensions of size 1, or of the whole, is an expand."""
    graph = editor.gm.graph
    for node in graph.find_nodes(op="call_function", target=aten.repeat.default):
        x, times = node.args
        sizes = shape_of(x.meta["val"])
        new = len(times) - len(sizes)
        shape: list[Any] = list(times[:new])
        for n, count in zip(sizes, times[new:], strict=True):
            if not (same(n, 1) or (isinstance(count, int) and count == 1)):
                break
            shape.append(count if same(n, 1) else -1)
        else:
            whole = editor.call(aten.expand.default, (x, shape), like=node)
            node.replace_all_uses_with(editor.call(aten.clone.default, (whole,), like=node))
            graph.erase_node(node)


def _spell_new(editor: Editor) -> None:
    """``x.new_zeros(shape)`` reads nothing of x, and ``zeros(shape).fill(value)`` nothing of zeros."""
    graph = editor.gm.graph
    for node in [n for n in graph.nodes if n.target in _MADE or _fills(n)]:
        made = node.meta["val"]
        target, args = aten.full.default, node.args[1:]
        if node.target in _MADE:
            target = _MADE[node.target]
        else:
            args = ([editor.number(n, like=node) for n in shape_of(made)], *args)
        options = {**node.kwargs, "dtype": made.dtype, "device": made.device}
        node.replace_all_uses_with(editor.call(target, args, options, like=node))
        graph.erase_node(node)


def _fills(node: fx.Node) -> bool:
    """Whether a tensor made from nothing is filled: no gradient of anything ends here."""
    return node.target is aten.fill.Scalar and not operands_of(node.args[0])  # type: ignore[arg-type]


def _spell_copies(editor: Editor) -> None:
    """``aten.copy``, which functionalization leaves for ``copy_``, has no derivative: cast and expand instead."""
    graph = editor.gm.graph
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        call = partial(editor.call, like=node)
        value, source = node.meta["val"], node.args[1]
        if source.meta["val"].dtype != value.dtype:
            source = call(aten._to_copy.default, (source,), {"dtype": value.dtype})
        shape = [editor.number(n, like=node) for n in shape_of(value)]
        whole = call(aten.expand.default, (source, shape))
        node.replace_all_uses_with(call(aten.clone.default, (whole,)))
        graph.erase_node(node)


def _spell_strided_writes(editor: Editor) -> None:
    """``as_strided_scatter`` (of ``fill_diagonal_``) has a wrong derivative in PyTorch: a scatter instead."""
    graph = editor.gm.graph
    found = graph.find_nodes(op="call_function", target=aten.as_strided_scatter.default)
    for node in found:
        x, source, size, stride, *given = node.args
        whole = x.meta["val"]
        offset = given[0] if given else whole.storage_offset()
        if not all(isinstance(n, int) for n in (*size, *stride, offset, *whole.shape)) or not whole.is_contiguous():
            raise NotNormalError(
                "a strided view of a tensor of dynamic size or not contiguous is written to", node.name
            )
        call = partial(editor.call, like=node)
        places: Any = offset - whole.storage_offset()
        for n, step in zip(size, stride, strict=True):
            along = call(aten.mul.Tensor, (call(aten.arange.default, (n,), {"device": whole.device}), step))
            rest = call(aten.unsqueeze.default, (places, -1)) if isinstance(places, fx.Node) else places
            places = call(aten.add.Tensor, (along, rest))
        flat, places, values = (call(aten.reshape.default, (v, [-1])) for v in (x, places, source))
        written = call(aten.scatter.src, (flat, 0, places, values))
        node.replace_all_uses_with(call(aten.reshape.default, (written, list(whole.shape))))
        graph.erase_node(node)
