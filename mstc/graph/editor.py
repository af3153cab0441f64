"""The one object that changes a graph; it records every edit."""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils.checkpoint import CheckpointPolicy

from mstc import compat
from mstc.graph.attention import SDPA
from mstc.graph.provenance import source_of
from mstc.graph.sizes import Size, evaluate, same, shape_of, size, symbols_of
from mstc.report import Edit

# Under "custom" in a node's metadata, which AOTAutograd hands on: positions of its results that are to be offloaded.
OFFLOADED = "mstc_offloaded"
# What tracing noted of lengths that an op makes of its data; it would name them so again.
_NEW_LENGTHS = "unbacked_bindings"
_PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "recompute", "ac_graph_id")


def has_order(node: fx.Node) -> bool:
    """Whether the node must keep its place among others of its kind: it draws random numbers or writes."""
    if node.op != "call_function" or not isinstance(node.target, compat.OpOverload):
        return False
    if node.target is SDPA:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in node.target.tags or bool(node.target._schema.is_mutable)


def passes_gradients(node: fx.Node) -> bool:
    """Whether the results of a call get gradients that go on to its inputs."""
    if node.target is torch.ops.aten.detach.default or not any(i.meta.get("needs_grad") for i in node.all_input_nodes):
        return False
    results = [v for v in compat.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return any(v.is_floating_point() or v.is_complex() for v in results)


def _draws_nothing(node: fx.Node) -> bool:
    """Attention is tagged random, but without dropout it may go when nothing reads it."""
    return node.target is SDPA and not has_order(node)


def add_call(
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    before: fx.Node,
    mode: compat.FakeTensorMode,
    shape: Sequence[Any] | None = None,
) -> fx.Node:
    """Add a call just before a node; its ``val`` is computed on fake tensors.

    shape: of its value, where the op would make a new symbol for a length that data decide.
    """
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, dict(kwargs))
    measure(node, mode, shape)
    return node


def measure(node: fx.Node, mode: compat.FakeTensorMode, shape: Sequence[Any] | None = None) -> None:
    """Compute a node's ``val`` on fake tensors; shape: see `add_call`."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    with mode, compat.symbolic_kernels(mode), torch.no_grad(), compat.unbound_lengths(mode):
        if shape is None:
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        else:
            node.meta["val"] = node.all_input_nodes[0].meta["val"].new_empty(shape)
    node.meta.pop(_NEW_LENGTHS, None)


class Editor:
    """Changes one graph in normal form on behalf of one pass after another.

    A pass calls `call` to add a node, `replace` to route uses to it, `set_output` to change
    what the graph returns; the driver calls `finish` after each pass. Nodes that a site recorded
    before another site was applied are looked up with `resolve`.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.edits: list[Edit] = []
        self.pass_name = ""
        self._replaced: dict[fx.Node, fx.Node] = {}
        self._mode = compat.fake_mode_of([n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")])

    def resolve(self, node: fx.Node) -> fx.Node:
        """The node that stands for ``node`` now, after the replacements made so far."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: fx.Node,
        before: fx.Node | None = None,
        shape: Sequence[Any] | None = None,
    ) -> fx.Node:
        """Add a call of ``target`` just before ``before`` (default: ``like``), with the provenance of ``like``.

        Its ``val`` is computed on fake tensors; it needs a gradient where one of its inputs does
        and its value can. shape: of its value, where the op would make a new symbol for a length that data decide.
        """
        node = add_call(target, args, kwargs or {}, before or like, self._mode, shape)
        node.meta |= {k: like.meta[k] for k in _PROVENANCE if k in like.meta}
        node.meta["needs_grad"] = passes_gradients(node)
        return node

    def measure(self, node: fx.Node, shape: Sequence[Any] | None = None) -> None:
        """Compute a node's ``val`` anew; shape: of it, where it is known (see `call`)."""
        measure(node, self._mode, shape)

    def getitem(self, node: fx.Node, index: int, *, like: fx.Node) -> fx.Node:
        """Add ``node[index]`` right behind ``node``."""
        return self.call(operator.getitem, (node, index), like=like, before=node.next)

    def number(self, expression: Size, *, like: fx.Node) -> Any:
        """An int as it is; an expression in dynamic lengths as a node that computes it."""
        recorder = _Recorder(self, like)
        lengths = {s: fx.Proxy(self.length(s, like=like), recorder) for s in symbols_of([expression])}
        found = evaluate(expression, lengths)
        return found.node if isinstance(found, fx.Proxy) else found

    def length(self, symbol: Size, *, like: fx.Node) -> fx.Node:
        """A node that holds a dynamic length: an input or a size of one, or what made it where data decide it."""
        node: fx.Node
        for node in [n for n in self.gm.graph.nodes if n.op in ("placeholder", "call_function")]:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and same(size(value), symbol):
                return node
            for dim, extent in enumerate(shape_of(value) if isinstance(value, torch.Tensor) else ()):
                if same(extent, symbol):
                    return self.call(torch.ops.aten.sym_size.int, (node, dim), like=like)
        raise AssertionError(f"nothing in the graph tells the length {symbol}")

    def replace(self, old: fx.Node, new: fx.Node, what: str) -> None:
        """Let every user of ``old`` use ``new``; ``old`` goes when nothing needs it."""
        old.replace_all_uses_with(new, propagate_meta=False)
        self._replaced[old] = new
        self.edits.append(Edit(self.pass_name, what, (new.name,), (old.name,), source_of(old)))

    def replace_many(self, pairs: Iterable[tuple[fx.Node, fx.Node]], removed: Iterable[str], what: str) -> None:
        """Replace several values by the outputs of one new node, recorded as one edit."""
        pairs = list(pairs)
        for old, new in pairs:
            old.replace_all_uses_with(new, propagate_meta=False)
            self._replaced[old] = new
        added = tuple(new.name for _, new in pairs)
        source = source_of(pairs[0][0]) if pairs else ""
        self.edits.append(Edit(self.pass_name, what, added, tuple(removed), source))

    def recompute(self, node: fx.Node, block: int, what: str) -> None:
        """Tag a node and its results to be run again in the backward rather than kept."""
        for tagged in (node, *(u for u in node.users if u.target is operator.getitem)):
            tagged.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            tagged.meta["ac_graph_id"] = block
        self.edits.append(Edit(self.pass_name, what, (node.name,), (), source_of(node)))

    def offload(self, node: fx.Node, results: tuple[int, ...], what: str) -> None:
        """Tag results of a node to wait elsewhere for the backward, where the lowering saves them."""
        node.meta["custom"] = {**node.meta.get("custom", {}), OFFLOADED: results}
        self.edits.append(Edit(self.pass_name, what, (node.name,), (), source_of(node)))

    def keep(self, node: fx.Node, what: str = "") -> None:
        """Take the tag of recomputation off a node and its results; ``what``: recorded, if given."""
        for tagged in (node, *(u for u in node.users if u.target is operator.getitem)):
            tagged.meta.pop("recompute", None)
            tagged.meta.pop("ac_graph_id", None)
        if what:
            self.edits.append(Edit(self.pass_name, what, (node.name,), (), source_of(node)))

    def set_outputs(self, values: list[Any], what: str) -> None:
        """Change what the graph returns, position by position."""
        output = self.gm.graph.output_node()
        output.args = (tuple(values),)
        output.meta["val"] = tuple(v.meta["val"] if isinstance(v, fx.Node) else v for v in values)
        self.edits.append(Edit(self.pass_name, what))

    def finish(self) -> None:
        """Bring the nodes into a valid order, drop dead ones, check and recompile."""
        graph = self.gm.graph
        self._sort()
        graph.eliminate_dead_code(is_impure_node=self._must_stay)
        graph.lint()
        self.gm.recompile()

    def _must_stay(self, node: fx.Node) -> bool:
        """What nothing reads, but has an effect. A random op goes where another draws in its place."""
        return node.is_impure() and not (_draws_nothing(node) or node in self._replaced)

    def _sort(self) -> None:
        """Stable topological order; random and writing ops keep their order among themselves."""
        nodes = list(self.gm.graph.nodes)
        rank = {n: i for i, n in enumerate(nodes)}
        waiting = {n: set(n.all_input_nodes) for n in nodes}
        followers: dict[fx.Node, set[fx.Node]] = {n: set(n.users) for n in nodes}
        ordered = [n for n in nodes if has_order(n)]
        for first, second in itertools.pairwise(ordered):
            waiting[second].add(first)
            followers[first].add(second)
        output = nodes[-1]
        waiting[output] |= {n for n in nodes if n is not output}
        for n in nodes:
            followers[n].add(output)
        ready = [rank[n] for n in nodes if not waiting[n]]
        heapq.heapify(ready)
        order: list[fx.Node] = []
        while ready:
            node = nodes[heapq.heappop(ready)]
            order.append(node)
            for user in followers[node]:
                waiting[user].discard(node)
                if not waiting[user] and user is not node:
                    heapq.heappush(ready, rank[user])
        assert len(order) == len(nodes), "the edited graph has a cycle"
        if order == nodes:
            return
        last = order[0]
        for node in order[1:]:
            last.append(node)
            last = node


class _Recorder(fx.proxy.GraphAppendingTracer):
    """Arithmetic on its proxies, dynamic sizes, becomes nodes of an editor."""

    def __init__(self, editor: Editor, like: fx.Node) -> None:
        super().__init__(like.graph)
        self._editor, self._like = editor, like

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> fx.Proxy:
        assert kind == "call_function" and not kwargs, f"{target} is no function of sizes"
        operands = tuple(a.node if isinstance(a, fx.Proxy) else a for a in args)
        return fx.Proxy(self._editor.call(target, operands, like=self._like), self)
