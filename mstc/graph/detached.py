"""Writes to detached tensors, in Dynamo's graph, before it is retraced.

``p = y.detach(); p += w`` gives p a gradient to w, while y, whose memory p shares, keeps its own. Functionalization
knows one value per memory: after the write it makes p anew by detaching, and the gradient is lost. Where nothing reads
y's memory but through p from the first write on, p may have memory of its own: a clone.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from mstc import compat

_WRITES = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


def with_own_memory(gm: fx.GraphModule) -> tuple[fx.GraphModule, fx.Node | None]:
    """The graph with clones of detached tensors that are written to, and a detach for which a clone is not enough."""
    found = [(node, writes) for node in gm.graph.nodes if _is_detach(node) and (writes := _writes(node))]
    for node, writes in found:
        if _read_beside(node, writes[0]):
            return gm, node
    if not found:
        return gm, None
    cloned = {node for node, _ in found}
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in gm.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        compat.copy_source(node, made[node])
        if node in cloned:
            copy = graph.call_method("clone", (made[node],))
            copy.meta = dict(node.meta)
            made[node] = copy
    return fx.GraphModule(gm, graph), None


def _is_detach(node: fx.Node) -> bool:
    return node.target in ("detach", torch.detach, compat.data_of) and bool(node.all_input_nodes)


def _writes(detach: fx.Node) -> list[fx.Node]:
    """The writes through the detached tensor or a view of it where a gradient is at stake."""
    through = _views(detach)
    return [
        n
        for n in detach.graph.nodes
        if target_of_write(n) in through and any(map(needs_grad, (*n.all_input_nodes, detach.all_input_nodes[0])))
    ]


def _views(detach: fx.Node) -> set[fx.Node]:
    """The detached tensor and everything made of it that lies in the same memory."""
    memory, found = memory_of(detach), {detach}
    for node in detach.graph.nodes:
        if any(i in found for i in node.all_input_nodes) and memory_of(node) == memory:
            found.add(node)
    return found


def _read_beside(detach: fx.Node, write: fx.Node) -> bool:
    """Whether the memory is read other than through the detached tensor once it is written to."""
    memory, through, written = memory_of(detach), _views(detach), False
    for node in detach.graph.nodes:
        written = written or node is write
        if written and any(memory_of(i) == memory and i not in through for i in node.all_input_nodes):
            return True
    # An input's memory is the caller's.
    return any(n.op in ("placeholder", "get_attr") and memory_of(n) == memory for n in detach.graph.nodes)


def target_of_write(node: fx.Node) -> fx.Node | None:
    name = str(getattr(node.target, "__name__", node.target))
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    return node.args[0] if name in _WRITES or (name.endswith("_") and not name.endswith("__")) else None


def memory_of(node: fx.Node) -> int | None:
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def needs_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad
