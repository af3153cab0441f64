"""``mstc::function``: what is no ATen op, as one op of the normal form.

    mstc::function(tensors, key) -> [outputs...]

- A `torch.autograd.Function` of the user's: Dynamo hands it on as two graphs, its forward and its own backward, which
  need not be the derivative of the forward.
- A stretch under ``vmap``, which Dynamo writes as calls that switch it on and off.
- Hooks on the gradient of a tensor (`mstc.graph.hooks`).

The passes see one op that they know nothing about; the lowering takes it apart again, since the op is made of nothing
but that call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.results import returned_by
from mstc.graph.text import digest


@dataclass(frozen=True)
class _Function:
    """Both graphs; the arguments with their tensors left out, where these go; whether it returns one tensor."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    arguments: tuple[Any, ...]
    places: tuple[int, ...]
    settings: Mapping[str, Any]
    single: bool

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        arguments = list(self.arguments)
        for place, tensor in zip(self.places, tensors, strict=True):
            arguments[place] = tensor
        found = compat.autograd_function_apply(self.forward, self.backward, *arguments, **self.settings)
        return [found] if self.single else list(found)


_functions: dict[str, Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]] = {}

torch.library.define("mstc::function", "(Tensor[] tensors, str key) -> Tensor[]")


@torch.library.impl("mstc::function", "CompositeImplicitAutograd")
def _function(tensors: Sequence[torch.Tensor], key: str) -> list[torch.Tensor]:
    return _functions[key](tensors)


def why_not(node: fx.Node, gm: fx.GraphModule) -> str | None:
    """Why such a call cannot be an op: it needs graphs of its own that return tensors, and changes nothing in place."""
    found = (getattr(gm, str(a.target), None) for a in node.args[:2] if isinstance(a, fx.Node))
    graphs = [g for g in found if isinstance(g, fx.GraphModule)]
    if len(graphs) != 2:
        return "its forward or backward is no graph"
    if any(g.graph.find_nodes(op="get_attr") for g in graphs):
        return "it holds tensors or graphs of its own"
    if node.kwargs.get("dirty_idx"):
        return "it changes its inputs in place"
    values = (a.meta.get("example_value") for a in node.args[2:] if isinstance(a, fx.Node))
    if not all(isinstance(v, torch.Tensor) for v in values):
        return "an argument of it is neither a tensor nor a constant"
    if not all(isinstance(n, fx.Node) for n in _outputs(graphs[0])):
        return "it returns something else than tensors"
    return None


def registered(function: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]], *text: object) -> str:
    """The key under which the op calls ``function``, which ``text`` tells from all others."""
    key = digest(*text)
    _functions[key] = function
    return key


def put(graph: fx.Graph, key: str, tensors: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    """The op at the end of a graph, and its results, which tell what the nodes tell in whose place they stand."""
    op = graph.call_function(torch.ops.mstc.function.default, (list(tensors), key))
    found = []
    for i, old in enumerate(results):
        op.meta.update({k: v for k, v in old.meta.items() if k in ("stack_trace", "nn_module_stack")})
        new = graph.call_function(operator.getitem, (op, i))
        new.meta.update(old.meta)
        found.append(new)
    return found


def call(forward: fx.GraphModule, backward: fx.GraphModule, *args: Any, **settings: Any) -> Any:
    """What stands for the call while the graph is traced: the op, its results as the call returns them."""
    places = tuple(i for i, a in enumerate(args) if isinstance(a, torch.Tensor))
    constants = tuple(None if i in places else a for i, a in enumerate(args))
    single = isinstance(returned_by(forward.graph)[0], fx.Node)
    function = _Function(forward, backward, constants, places, settings, single)
    key = registered(function, forward.code, backward.code, constants, places, settings)
    found = torch.ops.mstc.function.default([args[i] for i in places], key)
    return found[0] if single else tuple(found)


def fold_vmap(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with each stretch under ``vmap`` as one op; the graph itself where it has none.

    A stretch that reads sizes, or tensors or graphs of its own, stays as it is.
    """
    stretches = [s for s in _stretches(gm.graph) if _can_fold(s)]
    if not stretches:
        return gm
    ends = {s[-1]: s for s in stretches}
    inside = {n for s in stretches for n in s}
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node in ends:
            _fold(graph, ends[node], made)
        elif node not in inside:
            made[node] = graph.node_copy(node, made.__getitem__)
            compat.copy_source(node, made[node])
    return fx.GraphModule(gm, graph)


def _stretches(graph: fx.Graph) -> list[list[fx.Node]]:
    """Nodes from where vmap is switched on to where it is off again, what prepares it included."""
    found: list[list[fx.Node]] = []
    depth, start = 0, 0
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        step = compat.vmap_step(node)
        if step is None:
            continue
        start = i if depth == 0 and not (step == 1 and i and compat.vmap_step(nodes[i - 1]) == 0) else start
        depth += step
        if step < 0 and depth == 0:
            found.append(nodes[start : i + 1])
    return found


def _can_fold(stretch: Sequence[fx.Node]) -> bool:
    values = [n.meta.get("example_value") for n in _read(stretch)]
    return all(n.op in ("call_function", "call_method") for n in stretch) and all(
        isinstance(v, torch.Tensor) for v in values
    )


def _read(stretch: Sequence[fx.Node]) -> list[fx.Node]:
    """What a stretch reads from before it."""
    inside = set(stretch)
    return list(dict.fromkeys(i for n in stretch for i in n.all_input_nodes if i not in inside))


def _fold(graph: fx.Graph, stretch: Sequence[fx.Node], made: dict[fx.Node, fx.Node]) -> None:
    """Put the op for a stretch at the end of the new graph."""
    read, inside = _read(stretch), set(stretch)
    results = [n for n in stretch if any(u not in inside for u in n.users)]
    body = fx.Graph()
    own = {n: body.placeholder(f"x{i}") for i, n in enumerate(read)}
    for node in stretch:
        own[node] = body.node_copy(node, own.__getitem__)
    body.output([own[n] for n in results])
    run = fx.GraphModule(torch.nn.Module(), body)
    key = registered(lambda tensors: list(run(*tensors)), body)
    made.update(zip(results, put(graph, key, [made[n] for n in read], results), strict=True))


def _outputs(forward: fx.GraphModule) -> list[Any]:
    """The forward's graph returns (outputs, saved values)."""
    outputs, _ = returned_by(forward.graph)
    return [outputs] if isinstance(outputs, fx.Node) else list(outputs)
