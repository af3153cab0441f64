"""Bodies: a region's graph for a chunk of a given length, and its vector-Jacobian product.

The backward body is one joint graph: it recomputes what it needs of the forward and returns

- gradients of the token inputs, chunk-shaped;
- for a weight that only enters matrix products, the two *factors* (x, dy) of its gradient
  ``dW = dy^T x``, which the loop adds into one accumulator with ``addmm_``: a product returned by the
  body would allocate a full weight gradient per chunk;
- gradients of other shared inputs, summed over the chunk.

Outputs of the forward that are kept anyway are read instead of recomputed where that saves a matrix
product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.places import Place
from mstc.graph.regions import Region
from mstc.graph.sizes import Size, evaluate, shape_of, size, symbols_of
from mstc.ops import keep as keep  # defines mstc::keep
from mstc.ops.pieces import Cut, dense_strides, order_of
from mstc.ops.table import use_table_gradient

aten = torch.ops.aten

_TAKES_SIZES = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.full.default: 0,
    torch.ops.mstc.keep.default: 1,
}
# A squeeze would also drop an axis whose chunks have length 1.
_BECOMES_VIEW = (
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


# The length of the chunk that a body runs on, among the lengths that its sizes are made of.
LENGTH = sympy.Symbol("chunk_length", integer=True, positive=True)

Lengths = Mapping[sympy.Symbol, Any]  # what a body is made for: ints, SymInts, or proxies of its own inputs


def cut_of(place: Place) -> Cut:
    """How to cut along the axis."""
    return Cut(place.dim, place.outer, place.inner)


@dataclass(frozen=True)
class Value:
    """Shape, layout, dtype and device of one whole tensor of a loop; ``cut`` is None where it is not cut.

    Sizes that are no numbers are expressions in the graph's dynamic lengths; `at` puts these in.
    """

    shape: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cut: Cut | None

    @staticmethod
    def of(node: fx.Node, place: Place | None) -> Value:
        x = node.meta["val"]
        return Value(shape_of(x), order_of(x), x.dtype, x.device, cut_of(place) if place else None)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every size in it that may depend on a dynamic length."""
        return (*self.shape, self.cut.outer, self.cut.inner) if self.cut else self.shape

    def at(self, lengths: Lengths) -> Value:
        """The same value at these lengths."""
        cut = self.cut
        if cut is not None:
            cut = Cut(cut.dim, evaluate(cut.outer, lengths), evaluate(cut.inner, lengths))
        return replace(self, shape=tuple(evaluate(s, lengths) for s in self.shape), cut=cut)

    def chunk(self, length: Size) -> tuple[Size, ...]:
        return self.cut.shape(self.shape, length) if self.cut else self.shape

    def fake(self, mode: compat.FakeTensorMode, lengths: Lengths) -> torch.Tensor:
        """A stand-in for a dense chunk (or for the whole where nothing is cut)."""
        shape = tuple(evaluate(s, lengths) for s in self.chunk(LENGTH))
        strides = dense_strides(shape, self.order)
        with mode:
            return torch.empty_strided(shape, strides, dtype=self.dtype, device=self.device)


def dynamic_lengths(region: Region) -> tuple[sympy.Symbol, ...]:
    """The dynamic lengths that the region's sizes are made of."""
    return symbols_of(_sizes(region))


def _sizes(region: Region) -> Iterator[Size]:
    yield region.n
    inside = (*region.nodes, *region.sums)
    places = [*(p for _, p in (*region.tokens, *region.outputs)), *(p.place for p in region.proofs.values())]
    yield from (s for place in places for s in (place.outer, place.inner))
    for node in dict.fromkeys((*inside, *(i for n in inside for i in n.all_input_nodes))):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            yield from shape_of(value)
        elif isinstance(value, torch.SymInt):
            yield size(value)


def forward_body(region: Region, lengths: Lengths | None) -> fx.GraphModule:
    """The region's own nodes on a chunk: (tokens..., shared..., lengths...) -> [outputs..., sums...].

    lengths: what the chunk's length `LENGTH` and the dynamic lengths are; where None, the body takes them as inputs,
    the chunk's own last.
    """
    graph = fx.Graph()
    env: dict[tuple[fx.Node, Place | None], fx.Node] = {}
    for i, (node, place) in enumerate(region.tokens):
        env[node, place] = graph.placeholder(f"t{i}")
    for i, node in enumerate(region.shared):
        env[node, None] = graph.placeholder(f"s{i}")
    if lengths is None:
        tracer = fx.proxy.GraphAppendingTracer(graph)
        names = (*dynamic_lengths(region), LENGTH)
        lengths = {s: fx.Proxy(graph.placeholder(f"n{i}"), tracer) for i, s in enumerate(names)}
    made: dict[fx.Node, fx.Node] = {}
    for node in (*region.nodes, *region.sums):
        made[node] = _copy(graph, region, node, lengths, env, made)
    values = [made[n] for n, _ in region.outputs] + [made[n] for n in region.sums]
    graph.output(values)
    return fx.GraphModule(torch.nn.Module(), graph)


def with_lengths(body: fx.GraphModule, values: Sequence[int]) -> fx.GraphModule:
    """A body for dynamic lengths (its last inputs) with numbers in their place."""
    inputs = body.graph.find_nodes(op="placeholder")
    numbers: dict[fx.Node, Any] = dict(zip(inputs[len(inputs) - len(values) :], values, strict=True))
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        args = fx.node.map_arg(node.args, lambda n: numbers.get(n, n))
        if node.op == "call_function" and node.all_input_nodes and all(i in numbers for i in node.all_input_nodes):
            numbers[node] = node.target(*args)  # arithmetic of lengths
        elif node not in numbers:
            made[node] = graph.node_copy(node, lambda n: numbers[n] if n in numbers else made[n])
    return fx.GraphModule(torch.nn.Module(), graph)


def _copy(
    graph: fx.Graph,
    region: Region,
    node: fx.Node,
    lengths: Lengths,
    env: dict[tuple[fx.Node, Place | None], fx.Node],
    made: dict[fx.Node, fx.Node],
) -> fx.Node:
    """One node of the region in the body, its inputs mapped one by one as its proof says."""
    needs = iter(region.proofs[node].needs) if node in region.proofs else iter(())

    def number(value: Size) -> Any:
        found = evaluate(value, lengths)
        return found.node if isinstance(found, fx.Proxy) else found

    def lookup(source: fx.Node) -> Any:
        if isinstance(source.meta.get("val"), torch.SymInt):
            return number(size(source.meta["val"]))
        need = next(needs, None) if isinstance(source.meta.get("val"), torch.Tensor) else None
        return made[source] if source in made else env[source, need]

    args = fx.node.map_arg(node.args, lookup)
    kwargs = fx.node.map_arg(node.kwargs, lookup)
    target: Any = node.target
    if node in region.proofs and (target in _TAKES_SIZES or target in _BECOMES_VIEW):
        whole = shape_of(node.meta["val"])
        shape = [number(s) for s in cut_of(region.proofs[node].place).shape(whole, LENGTH)]
        if target in _BECOMES_VIEW:
            target, args, kwargs = aten.reshape.default, (args[0], shape), {}
        else:
            at = _TAKES_SIZES[target]
            args = (*args[:at], shape, *args[at + 1 :])
    return graph.call_function(target, args, kwargs)


@dataclass(frozen=True)
class Factors:
    """One product of a shared weight: dW = dy^T x (``transposed`` False) or x^T dy (True), rows flattened."""

    shared: int
    x: int
    dy: int
    transposed: bool


@dataclass(frozen=True)
class BackwardBody:
    """The joint graph of a body and how to call it.

    gm: (tokens at ``tokens``..., shared at ``shared``..., kept outputs at ``kept``..., gradients of the
    outputs and sums at ``grads``..., dynamic lengths...) -> flat list. In that list, ``token_grads[i]`` and
    ``shared_grads[j]`` are the positions of the gradients of token input i and shared input j, ``factors`` those of
    weight factors.
    ``values``: positions of the forward's own results where they were asked for.
    """

    gm: fx.GraphModule
    tokens: tuple[int, ...]
    shared: tuple[int, ...]
    kept: tuple[int, ...]
    grads: tuple[int, ...]
    token_grads: dict[int, int]
    shared_grads: dict[int, int]
    factors: tuple[Factors, ...]
    values: tuple[int, ...]


class _Differentiating(fx.Interpreter):
    """Runs a body; products with a shared weight use it detached and are noted with their input."""

    def __init__(self, gm: fx.GraphModule, weights: dict[str, int]) -> None:
        super().__init__(gm)
        self._weights = weights
        self.products: list[tuple[int, torch.Tensor, torch.Tensor, bool]] = []

    def run_node(self, n: fx.Node) -> Any:
        found = _weight_product(n, self._weights)
        if found is None:
            return super().run_node(n)
        position, transposed = found
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        at = 2 if n.target is aten.addmm.default else 1
        x = args[at - 1]
        y = _product(n.target, [a.detach() if i == at else a for i, a in enumerate(args)], kwargs)
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        self.products.append((position, x, y, transposed))
        return y


def _product(target: Any, args: list[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The product with rows flattened: kept apart, each batch would get a copy of the weight."""
    if target is not aten.linear.default or args[0].dim() < 3:
        return target(*args, **kwargs)  # type: ignore[no-any-return]
    x, *rest = args
    rows = target(x.reshape(-1, x.shape[-1]), *rest, **kwargs)
    return rows.view(*x.shape[:-1], rows.shape[-1])  # type: ignore[no-any-return]


def _weight_product(node: fx.Node, weights: dict[str, int]) -> tuple[int, bool] | None:
    """(position of the weight, whether its gradient is x^T dy) where this product's weight is a shared input."""
    if node.target is aten.linear.default:
        weight, transposed = node.args[1], False
    elif node.target in (aten.mm.default, aten.matmul.default):
        weight, transposed = node.args[1], True
    elif node.target is aten.addmm.default and not node.kwargs:
        weight, transposed = node.args[2], True
    else:
        return None
    if not isinstance(weight, fx.Node) or weight.name not in weights:
        return None
    return weights[weight.name], transposed


def backward_body(
    body: fx.GraphModule,
    tokens: Sequence[torch.Tensor],
    shared: Sequence[torch.Tensor],
    token_needs: Sequence[bool],
    shared_needs: Sequence[bool],
    results: Sequence[torch.Tensor],
    result_needs: Sequence[bool],
    keepable: Sequence[bool],
    with_values: bool = False,
    lengths: Sequence[torch.SymInt] = (),
) -> BackwardBody:
    """Trace the vector-Jacobian product of a body over fake chunks.

    token_needs, shared_needs: which inputs need gradients; results: fakes of the outputs and sums,
    result_needs: which of them have gradients; keepable: which outputs are kept anyway and may be
    read instead of being recomputed; with_values: also return all results (for a loss whose
    gradients are computed in the forward); lengths: what a body for dynamic lengths takes besides.
    """
    names = [n.name for n in body.graph.find_nodes(op="placeholder")]
    weights = {names[len(tokens) + j]: j for j, need in enumerate(shared_needs) if need and shared[j].dim() == 2}
    grads = [i for i, need in enumerate(result_needs) if need]
    layout: dict[str, Any] = {}

    def joint(*flat: Any) -> list[Any]:
        gs = flat[len(tokens) + len(shared) : len(flat) - len(lengths)]
        with torch.enable_grad():
            ts = _leaves(flat[: len(tokens)], token_needs)
            ss = _leaves(flat[len(tokens) : len(tokens) + len(shared)], shared_needs)
            run = _Differentiating(body, weights)
            outs = run.run(*ts, *ss, *flat[len(flat) - len(lengths) :])
            pairs = [(outs[i], g) for i, g in zip(grads, gs, strict=True) if outs[i].requires_grad]
            wanted = [t for t in ts if t.requires_grad] + [s for s in ss if s.requires_grad]
            wanted += [y for _, _, y, _ in run.products]
            found = (
                torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
                if pairs and wanted
                else [None] * len(wanted)
            )
        layout["products"] = [(p, t) for p, _, _, t in run.products]
        layout["present"] = [f is not None for f in found]
        return [*outs, *(x for _, x, _, _ in run.products), *(f for f in found if f is not None)]

    cotangents = [torch.empty_like(results[i]) for i in grads]
    with torch.no_grad():
        gm = compat.trace_flat(joint, [*tokens, *shared, *cotangents, *lengths])
    return _assemble(
        gm, layout, len(tokens), len(shared), token_needs, shared_needs, grads, len(results), keepable, with_values
    )


def _leaves(values: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    return [v.detach().requires_grad_() if need else v.detach() for v, need in zip(values, needs, strict=True)]


def _assemble(
    gm: fx.GraphModule,
    layout: dict[str, Any],
    n_tokens: int,
    n_shared: int,
    token_needs: Sequence[bool],
    shared_needs: Sequence[bool],
    grads: Sequence[int],
    n_results: int,
    keepable: Sequence[bool],
    with_values: bool,
) -> BackwardBody:
    """Name the joint graph's results, read kept outputs, drop what is not needed."""
    flat = list(gm.graph.output_node().args[0])  # type: ignore[arg-type]
    results, rest = flat[:n_results], flat[n_results:]
    products = layout["products"]
    xs, found = rest[: len(products)], iter(rest[len(products) :])
    gradients = [next(found) if present else None for present in layout["present"]]
    order = iter(gradients)
    token_nodes = {i: g for i, need in enumerate(token_needs) if need and (g := next(order)) is not None}
    shared_nodes = {j: g for j, need in enumerate(shared_needs) if need and (g := next(order)) is not None}
    dys = list(order)
    out: list[fx.Node] = []

    def place(node: fx.Node) -> int:
        if node not in out:
            out.append(node)
        return out.index(node)

    token_grads = {i: place(g) for i, g in token_nodes.items()}
    shared_grads = {j: place(g) for j, g in shared_nodes.items()}
    factors = tuple(
        Factors(j, place(x), place(dy), transposed)
        for (j, transposed), x, dy in zip(products, xs, dys, strict=True)
        if dy is not None
    )
    values = tuple(place(r) for r in results) if with_values else ()
    placeholders = gm.graph.find_nodes(op="placeholder")
    kept_nodes = {} if with_values else _read_kept(gm, results, out, keepable)
    gm.graph.output_node().args = (out,)
    gm.graph.eliminate_dead_code()
    token_ph, shared_ph = placeholders[:n_tokens], placeholders[n_tokens : n_tokens + n_shared]
    grad_ph = placeholders[n_tokens + n_shared : n_tokens + n_shared + len(grads)]
    used_tokens = tuple(i for i, p in enumerate(token_ph) if p.users or p in out)
    used_shared = tuple(j for j, p in enumerate(shared_ph) if p.users or p in out)
    used_grads = tuple(g for g, p in zip(grads, grad_ph, strict=True) if p.users or p in out)
    for p in (*token_ph, *shared_ph, *grad_ph):
        if not p.users and p not in out:
            gm.graph.erase_node(p)
    # Kept outputs stand between the shared inputs and the gradients.
    kept = tuple(sorted(kept_nodes))
    anchor = next((p for p in grad_ph if p in gm.graph.nodes and (p.users or p in out)), None)
    for i in kept:
        if anchor is not None:
            anchor.prepend(kept_nodes[i])
    use_table_gradient(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return BackwardBody(gm, used_tokens, used_shared, kept, used_grads, token_grads, shared_grads, factors, values)


def _read_kept(
    gm: fx.GraphModule, results: Sequence[Any], out: list[fx.Node], keepable: Sequence[bool]
) -> dict[int, fx.Node]:
    """Let the backward read a kept output wherever that makes a matrix product unnecessary."""
    read: dict[int, fx.Node] = {}
    for i, node in enumerate(results):
        if i >= len(keepable) or not keepable[i] or not isinstance(node, fx.Node) or node.op == "placeholder":
            continue
        users = [u for u in node.users if u.op != "output"]
        if not users or not _saves_product(node, out):
            continue
        last = gm.graph.find_nodes(op="placeholder")[-1]
        with gm.graph.inserting_after(last):
            kept = gm.graph.placeholder(f"kept{i}")
        kept.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, kept)
        out[:] = [kept if n is node else n for n in out]
        read[i] = kept
    return read


def _saves_product(node: fx.Node, out: Sequence[fx.Node]) -> bool:
    """Whether a matrix product is needed for nothing but ``node`` in the backward."""
    needed: set[fx.Node] = set()
    stack = [n for n in out if n is not node]
    while stack:
        current = stack.pop()
        if current in needed or current is node:
            continue
        needed.add(current)
        stack.extend(current.all_input_nodes)
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current in needed:
            continue
        seen.add(current)
        if current.target in _PRODUCTS:
            return True
        stack.extend(current.all_input_nodes)
    return False


__all__ = [
    "LENGTH",
    "BackwardBody",
    "Factors",
    "Value",
    "backward_body",
    "cut_of",
    "dynamic_lengths",
    "forward_body",
    "with_lengths",
]
