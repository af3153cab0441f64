"""Python floats that change from call to call, as tensors of no dimension.

Dynamo hands such a float on as a tensor of no dimension and its ``item()``. A loop's inputs are tensors, and a number
in a body would be a constant of it. So an op that reads the number gets the tensor ``1.0 * number`` in its place,
where it has an overload for tensors and no other result. The spelling matters: it is what AOTAutograd in its turn makes
a tensor of, and what keeps Dynamo from compiling anew for each value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.editor import Editor

aten = torch.ops.aten

# Ops with numbers among their arguments, and their overloads with tensors there, in the same order.
_TENSOR_FORMS: dict[object, Callable[..., Any]] = {
    **{op: op for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)},
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.pow.Scalar: aten.pow.Tensor_Tensor,
    aten.eq.Scalar: aten.eq.Tensor,
    aten.ne.Scalar: aten.ne.Tensor,
    aten.gt.Scalar: aten.gt.Tensor,
    aten.ge.Scalar: aten.ge.Tensor,
    aten.lt.Scalar: aten.lt.Tensor,
    aten.le.Scalar: aten.le.Tensor,
    aten.masked_fill.Scalar: aten.masked_fill.Tensor,
    aten.where.ScalarOther: aten.where.self,
    aten.where.ScalarSelf: aten.where.self,
    aten.clamp.default: aten.clamp.Tensor,
}


def numbers_as_tensors(gm: fx.GraphModule) -> None:
    """Let ops read tensors in place of floats.

    Where an op without such an overload reads one, Dynamo is asked to trace the function again with it as a constant.
    """
    editor = Editor(gm)
    made: dict[fx.Node, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            numbers = [i for i in node.all_input_nodes if is_float(i)]
            if numbers and not _read_tensors(editor, node, made):
                compat.trace_with_constants([n.meta["val"] for n in numbers])


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is a float that is known at run time only."""
    return isinstance(node.meta.get("val"), torch.SymFloat)


def _read_tensors(editor: Editor, node: fx.Node, made: dict[fx.Node, fx.Node]) -> bool:
    """Put the overload with tensors in the node's place; whether there is one."""
    form = _TENSOR_FORMS.get(node.target)
    given = (*node.args, *(node.kwargs.get(k) for k in ("min", "max")))
    if form is None or any(is_float(i) for i in node.all_input_nodes if i not in given):
        return False
    whole: torch.Tensor = node.meta["val"]
    # A tensor of no dimension decides the result's dtype only among its like.
    like = whole.dtype if whole.dim() == 0 and whole.is_floating_point() else torch.float64

    def tensor(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return _tensor(editor, value, like, made) if is_float(value) else value
        return value

    args = [tensor(a) for a in node.args]
    kwargs = {k: tensor(v) for k, v in node.kwargs.items()}
    if node.target is not form:
        args = [_constant(editor, a, like, node) if _is_number(a) else a for a in args]
        kwargs = {k: _constant(editor, v, like, node) if _is_number(v) else v for k, v in kwargs.items()}
    new = editor.call(form, tuple(args), kwargs, like=node)
    if new.meta["val"].dtype != whole.dtype:
        new = editor.call(aten._to_copy.default, (new,), {"dtype": whole.dtype}, like=node)
    editor.replace(node, new, f"{node.name} reads a tensor in place of a float")
    return True


def _tensor(editor: Editor, number: fx.Node, dtype: torch.dtype, made: dict[fx.Node, fx.Node]) -> fx.Node:
    """The number in a tensor, written right behind it."""
    if number not in made:
        one = editor.call(aten.full.default, ([], 1.0), {"dtype": torch.float64}, like=number, before=number.next)
        made[number] = editor.call(aten.mul.Tensor, (one, number), like=number, before=one.next)
    found = made[number]
    if dtype != torch.float64:
        found = editor.call(aten._to_copy.default, (found,), {"dtype": dtype}, like=number, before=found.next)
    return found


def _constant(editor: Editor, value: float, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    return editor.call(aten.full.default, ([], value), {"dtype": dtype}, like=like)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
