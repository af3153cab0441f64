"""The vector-Jacobian product of a body, as one joint graph with what it recomputes of the forward.

What a loop runs in its backward returns

- gradients of the token inputs, chunk-shaped;
- for a weight that only enters matrix products, the two *factors* (x, dy) of its gradient
  ``dW = dy^T x``, which the loop adds into one accumulator with ``addmm_``: a product returned by the
  body would allocate a full weight gradient per chunk;
- gradients of other shared inputs, summed over the chunk, in at least float32 (`wide_sums`).

Outputs of the forward that are kept anyway are read instead of recomputed where that saves a matrix
product; what a plan saves for the backward is always read.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.costs import is_heavy
from mstc.graph.reach import ancestors
from mstc.graph.results import returned_by
from mstc.ops.table import use_table_gradient
from mstc.ops.wide_sums import widened

aten = torch.ops.aten


@dataclass(frozen=True)
class Factors:
    """One product of a shared weight: dW = dy^T x (``transposed`` False) or x^T dy (True), rows flattened."""

    shared: int
    x: int
    dy: int
    transposed: bool


@dataclass(frozen=True)
class Backward:
    """How to call the body that runs in the backward, and where its results stand.

    (tokens at ``tokens``..., shared at ``shared``..., kept outputs at ``kept``..., gradients of the
    outputs and sums at ``grads``..., dynamic lengths...) -> flat list. In that list, ``token_grads[i]`` and
    ``shared_grads[j]`` are the positions of the gradients of token input i and shared input j, ``factors`` those of
    weight factors.
    ``values``: positions of the forward's own results where they were asked for. ``token_sources[i]`` and
    ``shared_sources[j]``: the results whose gradients reach that of the input; none where it is read behind a
    ``detach`` only. Such an input gets no gradient, as in eager: to an optimizer that is not the same as zeros.
    """

    tokens: tuple[int, ...]
    shared: tuple[int, ...]
    kept: tuple[int, ...]
    grads: tuple[int, ...]
    token_grads: dict[int, int]
    shared_grads: dict[int, int]
    factors: tuple[Factors, ...]
    values: tuple[int, ...]
    token_sources: tuple[tuple[int, ...], ...]
    shared_sources: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class BackwardBody:
    """What runs in the backward, to be called as ``call`` says."""

    gm: fx.GraphModule
    call: Backward


@dataclass(frozen=True)
class Product:
    """A product with the weight at ``shared``: its other operand x, and the gradient of its result if there is one."""

    shared: int
    transposed: bool
    x: fx.Node
    dy: fx.Node | None


@dataclass(frozen=True)
class Joint:
    """A body and its vector-Jacobian product as traced, with the nodes of inputs and results.

    gm: (tokens..., shared..., gradients of the results..., dynamic lengths...); results: of the body itself;
    cotangents: by the positions of results; token_grads, shared_grads: by the positions of inputs.
    """

    gm: fx.GraphModule
    tokens: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    cotangents: dict[int, fx.Node]
    results: tuple[fx.Node, ...]
    products: tuple[Product, ...]
    token_grads: dict[int, fx.Node]
    shared_grads: dict[int, fx.Node]

    @property
    def differentiates(self) -> bool:
        """Whether a gradient goes through the body: an op without a derivative (a Legendre polynomial) lets none."""
        return bool(self.token_grads or self.shared_grads or any(p.dy is not None for p in self.products))


@dataclass(frozen=True)
class Needs:
    """Which token inputs, shared inputs and results (outputs, then sums) have gradients."""

    tokens: tuple[bool, ...]
    shared: tuple[bool, ...]
    results: tuple[bool, ...]


@dataclass(frozen=True)
class Fakes:
    """Stand-ins for what a body takes and returns of one chunk, dense as the loop reads and writes it.

    results: outputs, then sums; lengths: what a body for dynamic lengths takes besides.
    """

    tokens: Sequence[torch.Tensor]
    shared: Sequence[torch.Tensor]
    results: Sequence[torch.Tensor]
    lengths: Sequence[torch.SymInt] = ()

    def inputs(self) -> list[Any]:
        """What the body takes."""
        return [*self.tokens, *self.shared, *self.lengths]

    def inputs_of(self, call: Backward) -> list[Any]:
        """What the backward body takes, each a tensor of its own: one that comes twice is one input to AOTAutograd."""
        return [
            *(self.tokens[i] for i in call.tokens),
            *(self.shared[j] for j in call.shared),
            *(self.results[i] for i in call.kept),
            *(torch.empty_like(self.results[i]) for i in call.grads),
            *self.lengths,
        ]


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
    rows = target(x.flatten(0, -2), *rest, **kwargs)
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


def trace_joint(body: fx.GraphModule, fakes: Fakes, needs: Needs) -> Joint:
    """Trace a body and its vector-Jacobian product over fake chunks."""
    a, b = len(fakes.tokens), len(fakes.tokens) + len(fakes.shared)
    grads = [i for i, need in enumerate(needs.results) if need]
    c = b + len(grads)
    names = [n.name for n in body.graph.find_nodes(op="placeholder")]
    weights = {names[a + j]: j for j, need in enumerate(needs.shared) if need and fakes.shared[j].dim() == 2}
    products: list[tuple[int, bool]] = []
    present: list[bool] = []

    def joint(*flat: Any) -> list[Any]:
        run = _Differentiating(body, weights)
        with torch.enable_grad():
            leaves = _leaves(flat[:b], (*needs.tokens, *needs.shared))
            outs = run.run(*leaves, *flat[c:])
            wanted = [x for x in leaves if x.requires_grad] + [y for _, _, y, _ in run.products]
            found = _gradients([outs[i] for i in grads], wanted, flat[b:c])
        products[:] = [(shared, transposed) for shared, _, _, transposed in run.products]
        present[:] = [f is not None for f in found]
        return [*outs, *(x for _, x, _, _ in run.products), *(f for f in found if f is not None)]

    cotangents = [torch.empty_like(fakes.results[i]) for i in grads]
    with torch.no_grad():
        gm = compat.trace_flat(joint, [*fakes.tokens, *fakes.shared, *cotangents, *fakes.lengths])
    returned = iter(returned_by(gm.graph))
    results = tuple(itertools.islice(returned, len(fakes.results)))
    xs = list(itertools.islice(returned, len(products)))
    found = iter([next(returned) if there else None for there in present])
    token_grads = {i: g for i, need in enumerate(needs.tokens) if need and (g := next(found)) is not None}
    shared_grads = {j: g for j, need in enumerate(needs.shared) if need and (g := next(found)) is not None}
    made = tuple(Product(j, t, x, dy) for (j, t), x, dy in zip(products, xs, found, strict=True))
    inputs = tuple(gm.graph.find_nodes(op="placeholder"))
    by_result = dict(zip(grads, inputs[b:c], strict=True))
    return Joint(gm, inputs[:a], inputs[a:b], by_result, results, made, token_grads, shared_grads)


def _gradients(
    outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """Of the outputs that depend on anything that needs a gradient; None where none of them reaches."""
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)


def _leaves(values: Sequence[torch.Tensor], needs: Sequence[bool]) -> list[torch.Tensor]:
    return [v.detach().requires_grad_() if need else v.detach() for v, need in zip(values, needs, strict=True)]


def backward_body(
    joint: Joint, keepable: Sequence[bool], saved: Collection[int] = (), with_values: bool = False
) -> BackwardBody:
    """What the loop runs, made of the joint graph: results named, kept outputs read, the rest dropped.

    keepable: which outputs are kept anyway and may be read instead of being recomputed; saved: those that are kept
    for this alone; with_values: also return all results (for a loss whose gradients are computed in the forward).
    """
    gm = joint.gm
    token_sources, shared_sources = _sources(joint)
    out: list[fx.Node] = []

    def place(node: fx.Node) -> int:
        if node not in out:
            out.append(node)
        return out.index(node)

    token_grads = {i: place(g) for i, g in joint.token_grads.items()}
    shared_grads = {j: place(widened(g)) for j, g in joint.shared_grads.items()}
    factors = tuple(
        Factors(p.shared, place(p.x), place(p.dy), p.transposed) for p in joint.products if p.dy is not None
    )
    values = tuple(place(r) for r in joint.results) if with_values else ()
    kept_nodes = {} if with_values else _read_kept(joint, out, keepable, saved)
    gm.graph.output_node().args = (out,)
    gm.graph.eliminate_dead_code()
    tokens, shared, grads = _drop_unused_inputs(joint)
    kept = tuple(sorted(kept_nodes))
    # They stand between the shared inputs and the gradients.
    if grads:
        for i in kept:
            joint.cotangents[grads[0]].prepend(kept_nodes[i])
    use_table_gradient(gm.graph)
    gm.graph.lint()
    gm.recompile()
    call = Backward(
        tokens, shared, kept, grads, token_grads, shared_grads, factors, values, token_sources, shared_sources
    )
    return BackwardBody(gm, call)


def _drop_unused_inputs(joint: Joint) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The positions of the tokens, shared inputs and gradients of results that are read; the others go."""
    inputs = (joint.tokens, joint.shared, tuple(joint.cotangents.values()))
    used = {p for p in itertools.chain(*inputs) if p.users}
    for p in itertools.chain(*inputs):
        if p not in used:
            joint.gm.graph.erase_node(p)
    tokens, shared = (tuple(i for i, p in enumerate(ps) if p in used) for ps in inputs[:2])
    return tokens, shared, tuple(i for i, p in joint.cotangents.items() if p in used)


def _sources(joint: Joint) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """For each token input and each shared input: the results whose gradients its own is made of."""

    def of(gradients: list[fx.Node]) -> tuple[int, ...]:
        above = ancestors(gradients)
        found = tuple(i for i, cotangent in joint.cotangents.items() if cotangent in above)
        # A derivative that is zero whatever comes in still is one.
        return found or (tuple(joint.cotangents) if gradients else ())

    made: dict[int, list[fx.Node]] = {}
    for j, gradient in joint.shared_grads.items():
        made.setdefault(j, []).append(gradient)
    for product in joint.products:
        if product.dy is not None:
            made.setdefault(product.shared, []).append(product.dy)
    tokens = tuple(of([joint.token_grads[i]] if i in joint.token_grads else []) for i in range(len(joint.tokens)))
    return tokens, tuple(of(made.get(j, [])) for j in range(len(joint.shared)))


def _read_kept(
    joint: Joint, out: list[fx.Node], keepable: Sequence[bool], saved: Collection[int]
) -> dict[int, fx.Node]:
    """Let the backward read a kept output wherever that makes a matrix product unnecessary, and all that was saved."""
    graph = joint.gm.graph
    read: dict[int, fx.Node] = {}
    for i, node in enumerate(joint.results):
        if i >= len(keepable) or not keepable[i] or not isinstance(node, fx.Node) or node.op == "placeholder":
            continue
        users = [u for u in node.users if u.op != "output"]
        if (not users and node not in out) or not (i in saved or (users and _saves_product(node, out))):
            continue
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            kept = graph.placeholder(f"kept{i}")
        kept.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, kept)
        out[:] = [kept if n is node else n for n in out]
        read[i] = kept
    return read


def _saves_product(node: fx.Node, out: Sequence[fx.Node]) -> bool:
    """Whether a matrix product is needed for nothing but ``node`` in the backward."""
    everything = set(node.graph.nodes)
    needed = ancestors([n for n in out if n is not node], everything - {node})
    return any(is_heavy(n) for n in ancestors([node], everything - needed))
