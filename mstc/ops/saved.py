"""What a compiled graph saves for its backward, seen after AOTAutograd parted the two: offloading edits both.

    forward:   ..., x = f(...), ...          ->  x = f(...), handle = offload(x), ...; handle is saved in place of x
    backward:  ..., g(x, ...)                ->  x = fetch(handle, handles that come next), g(x, ...)

Everything in the backward that reads x reads the fetched bytes, whatever it is: loops, attention, what runs again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.editor import OFFLOADED
from mstc.graph.results import returned_by
from mstc.graph.text import digest
from mstc.graph.views import is_view
from mstc.ops import offload as _registered  # noqa: F401  (the ops that are called below)
from mstc.ops.pieces import dense_strides, order_of


def offloads_of(gm: fx.GraphModule) -> str:
    """A digest of what is tagged in a graph; "" where nothing is."""
    tags = {n.name: n.meta["custom"][OFFLOADED] for n in gm.graph.nodes if OFFLOADED in n.meta.get("custom", {})}
    return digest(*tags.items()) if tags else ""


def tags_of(gm: fx.GraphModule) -> str:
    """A digest of what is tagged in a graph, to wait elsewhere or to run again; "" where nothing is.

    Tags stand beside the code of a graph, which is all of it that AOTAutograd's cache knows.
    """
    found = [n for n in gm.graph.nodes if "recompute" in n.meta]
    blocks = sorted({n.meta.get("ac_graph_id", 0) for n in found})
    again = [(n.name, str(n.meta["recompute"]), blocks.index(n.meta.get("ac_graph_id", 0))) for n in found]
    offloads = offloads_of(gm)
    return digest(offloads, *again) if offloads or again else ""


def offload_saved(forward: fx.GraphModule, backward: fx.GraphModule, results: int) -> None:
    """Let the tagged values among those saved wait elsewhere; ``results``: the forward's own, which stay."""
    returned = returned_by(forward.graph)
    inputs = {n.name: n for n in backward.graph.find_nodes(op="placeholder")}
    own = set(returned[:results])
    fetched = []
    for i, value in enumerate(returned[results:], results):
        if not isinstance(value, fx.Node) or value in own or not _tagged(value):
            continue
        placeholder = inputs[value.name]
        if placeholder.users:
            returned[i] = _offload(forward.graph, value)
            fetched.append((placeholder, returned[i]))
    if fetched:
        forward.graph.output_node().args = (tuple(returned),)
        _fetch(backward.graph, fetched)


def _tagged(node: fx.Node) -> bool:
    """Whether the value is a tagged result that lies densely in memory of its own."""
    value, source, index = node.meta.get("val"), node, 0
    if node.target is operator.getitem:
        source, index = node.args  # type: ignore[assignment]
    if index not in source.meta.get("custom", {}).get(OFFLOADED, ()) or is_view(node):
        return False
    return isinstance(value, torch.Tensor) and value.stride() == dense_strides(value.shape, order_of(value))


def _offload(graph: fx.Graph, value: fx.Node) -> fx.Node:
    x = value.meta["val"]
    with graph.inserting_after(value):
        handle = graph.call_function(torch.ops.mstc.offload.default, (value, list(x.stride())))
    handle.meta = {"val": x.new_empty((x.numel() * x.element_size(),), dtype=torch.uint8, device="cpu")}
    return handle


def _fetch(graph: fx.Graph, pairs: Sequence[tuple[fx.Node, fx.Node]]) -> None:
    """Fetch each value just before it is read first, and let the fetches of one place start those of the next."""
    for placeholder, _ in pairs:
        for user in list(placeholder.users):
            _sink(user)
    order = {n: i for i, n in enumerate(graph.nodes)}
    places: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
    for placeholder, handle in pairs:
        first = min(placeholder.users, key=lambda n: order[n])
        places.setdefault(first, []).append((placeholder, handle))
    sequence = sorted(places, key=lambda n: order[n])
    for place, following in zip(sequence, [*sequence[1:], None], strict=True):
        upcoming = [p for p, _ in places[following]] if following is not None else []
        for placeholder, handle in places[place]:
            _fetch_one(graph, placeholder, handle, place, upcoming)
            upcoming = []


def _fetch_one(graph: fx.Graph, placeholder: fx.Node, handle: fx.Node, place: fx.Node, upcoming: list[fx.Node]) -> None:
    x = placeholder.meta["val"]
    readers = list(placeholder.users)
    with graph.inserting_before(place):
        args: Any = (placeholder, upcoming, list(x.shape), list(x.stride()), x.dtype, x.device)
        fetched = graph.call_function(torch.ops.mstc.fetch.default, args)
    fetched.meta = {"val": x}
    placeholder.meta["val"] = handle.meta["val"]
    placeholder.meta.pop("tensor_meta", None)
    for reader in readers:
        if reader.target is not torch.ops.mstc.fetch.default:
            reader.replace_input_with(placeholder, fetched)


def _sink(node: fx.Node) -> None:
    """Move a view, and views of it, down to where they are read."""
    if node.op != "call_function" or not is_view(node) or not node.users:
        return
    for user in list(node.users):
        _sink(user)
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    first = min(node.users, key=lambda n: order[n])
    first.prepend(node)
