"""Hooks on the gradients of activations, in Dynamo's graph, before it is retraced.

``x.register_hook(f)`` inside the function is the op ``x = register_hook(x, f, *values)``, with f as a graph. A hook
sees the sum of what comes from *all* readers of x, those before the registration too, and passes on what it makes of
it:

    y = function(x, *values),   dL/dx = f(dL/dy, *values)

where every reader of x reads y. Several hooks of one tensor are one op, since they run in the order of registration. A
hook that does nothing (a check that is settled while tracing) is left out, so that no region ends there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph import functions
from mstc.graph.detached import memory_of, needs_grad, target_of_write
from mstc.graph.results import returned_by
from mstc.graph.sizes import shape_of, size


@dataclass(frozen=True)
class _Hooks:
    """What the op does: the hooks stand on a view that only its readers know.

    given: what each hook reads besides the gradient: a length of the tensor, or (None) the next of the other tensors.
    """

    register: compat.HigherOrderOperator
    bodies: tuple[fx.GraphModule, ...]
    given: tuple[tuple[int | None, ...], ...]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        x, *values = tensors
        y = x.view_as(x)
        if y.requires_grad:
            others = iter(values)
            for body, given in zip(self.bodies, self.given, strict=True):
                self.register(y, body, *(next(others) if d is None else y.shape[d] for d in given))
        return [y]


def fold_hooks(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with the hooks of each tensor as one op; the graph itself where it has none, or one that must stay.

    What stays: hooks of inputs, of tensors that are written to, and of tensors that are read before a hook's own values
    are there; hooks that hold tensors of their own, or read anything but tensors and lengths of the one they are on.
    """
    hooks = [n for n in gm.graph.nodes if _is_hook(n)]
    if not hooks:
        return gm
    groups: dict[fx.Node, list[fx.Node]] = {}
    for hook in hooks:
        if not _does_nothing(_body(hook, gm)):
            groups.setdefault(_hooked(hook), []).append(hook)
    place = {n: i for i, n in enumerate(gm.graph.nodes)}
    if not all(_can_fold(x, group, gm) for x, group in groups.items()):
        return gm
    ends = {x: max((x, *_values(group)), key=place.__getitem__) for x, group in groups.items()}
    if not all(_unread(x, end, place) for x, end in ends.items()):
        return gm
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if not _is_hook(node) and not (node.op == "get_attr" and all(map(_is_hook, node.users))):
            made[node] = graph.node_copy(node, lambda n: made[_hooked(n)])
            compat.copy_source(node, made[node])
        for x in (x for x, end in ends.items() if end is node):
            made[x] = _fold(graph, x, groups[x], gm, made)
    return fx.GraphModule(gm, graph)


def _is_hook(node: fx.Node) -> bool:
    return isinstance(node.target, compat.HigherOrderOperator) and str(node.target) == "register_hook"


def _hooked(node: fx.Node) -> fx.Node:
    """The tensor that the hook, which returns it, is registered on."""
    while _is_hook(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _given(hook: fx.Node) -> tuple[int | None, ...]:
    """Which dimension of the tensor each value is the length of; None where it is none."""
    lengths = shape_of(_hooked(hook).meta["example_value"])
    found = (size(_example(v)) if isinstance(_example(v), torch.SymInt) else None for v in hook.args[2:])
    return tuple(lengths.index(n) if n in lengths else None for n in found)


def _example(value: Any) -> Any:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _values(group: Sequence[fx.Node]) -> list[Any]:
    """What the hooks read besides the gradient and lengths of the tensor."""
    pairs = ((v, d) for hook in group for v, d in zip(hook.args[2:], _given(hook), strict=True))
    return [_hooked(v) if isinstance(v, fx.Node) else v for v, d in pairs if d is None]


def _body(hook: fx.Node, gm: fx.GraphModule) -> fx.GraphModule:
    body: fx.GraphModule = getattr(gm, str(hook.args[1].target))  # type: ignore[union-attr]
    return body


def _does_nothing(body: fx.GraphModule) -> bool:
    calls = any(n.op not in ("placeholder", "output") for n in body.graph.nodes)
    return not calls and returned_by(body.graph) == [None]


def _can_fold(x: fx.Node, group: Sequence[fx.Node], gm: fx.GraphModule) -> bool:
    if x.op == "placeholder" or any(_body(h, gm).graph.find_nodes(op="get_attr") for h in group):
        return False
    written = {memory_of(t) for n in gm.graph.nodes if (t := target_of_write(n)) is not None}
    return all(isinstance(_example(v), torch.Tensor) for v in _values(group)) and memory_of(x) not in written


def _unread(x: fx.Node, end: fx.Node, place: Mapping[fx.Node, int]) -> bool:
    """Whether nothing that a gradient comes back from reads the tensor up to there."""
    names, readers = [x], list[fx.Node]()
    for name in names:
        names += filter(_is_hook, name.users)
        readers += (u for u in name.users if not _is_hook(u))
    return all(place[r] > place[end] or not needs_grad(r) for r in readers)


def _fold(
    graph: fx.Graph, x: fx.Node, group: Sequence[fx.Node], gm: fx.GraphModule, made: Mapping[fx.Node, fx.Node]
) -> fx.Node:
    """Put the op for one tensor's hooks at the end of the new graph."""
    bodies, given = tuple(_body(h, gm) for h in group), tuple(map(_given, group))
    target: Any = group[0].target
    read = [made[n] for n in (x, *_values(group))]
    key = functions.registered(_Hooks(target, bodies, given), *(b.code for b in bodies), given)
    (result,) = functions.put(graph, key, read, group[:1])
    return result
