"""Bodies that write results where they belong in the whole tensors, instead of returning chunks for a copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from mstc.ops.body import BackwardBody, Value

aten = torch.ops.aten


def write_into(gm: fx.GraphModule, positions: Sequence[int]) -> fx.GraphModule:
    """A body with the results at ``positions`` written into further inputs, its last, and None in their place."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    results = list(graph.graph_copy(gm.graph, made))  # type: ignore[arg-type]
    last = graph.find_nodes(op="placeholder")[-1]
    for number, at in enumerate(positions):
        with graph.inserting_after(last):
            last = graph.placeholder(f"into{number}")
        value = results[at]
        graph.call_function(aten.copy_.default, (last, value))
        last.meta = dict(value.meta)
        results[at] = None
    graph.output(results)
    return fx.GraphModule(gm, graph)


def writable(values: Sequence[Value]) -> tuple[int, ...]:
    """Which tensors have chunks that are plain slices of them."""
    return tuple(i for i, v in enumerate(values) if v.cut is not None and v.cut.outer == 1)


def writable_results(joint: BackwardBody, tokens: Sequence[Value], outputs: Sequence[Value]) -> dict[int, Value]:
    """Positions in a backward body's results that nothing but one whole tensor takes, and that tensor."""
    whole = {i: tokens[i] for i in writable(tokens)}
    found = [(at, whole[i]) for i, at in joint.token_grads.items() if i in whole]
    slices = writable(outputs) if joint.values else ()
    found += [(joint.values[i], outputs[i]) for i in slices]
    taken = [*joint.token_grads.values(), *joint.values, *joint.shared_grads.values()]
    taken += [at for f in joint.factors for at in (f.x, f.dy)]
    return {at: value for at, value in found if taken.count(at) == 1}
