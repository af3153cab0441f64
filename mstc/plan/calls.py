"""A graph with loops as a list of calls: what each reads, makes, and keeps for its backward.

A *memory* is what an allocator hands out: views share the memory of what they view. Names of memories are
names of nodes; one result of several is ``node:index``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils.flop_counter import flop_registry

from mstc.graph.attention import is_attention, is_causal, share_seen, window_of
from mstc.graph.costs import bytes_of, hint, is_heavy, matmul_flops, numel
from mstc.graph.editor import OFFLOADED
from mstc.graph.provenance import layer_of
from mstc.graph.views import is_view
from mstc.ops.loop import LOSS_LOOP, is_loop
from mstc.ops.program import Program, program
from mstc.plan.attention import workspace_of_attention
from mstc.plan.work import Cost, loop_cost

aten = torch.ops.aten
_SCANS = tuple(f"mstc.{name}.default" for name in ("scalar_decay", "vector_decay", "delta_rule", "dplr"))


@dataclass(frozen=True)
class Saving:
    """The same loop with values inside it saved for its backward: the names of these nodes, and its program."""

    values: tuple[str, ...]
    program: Program


@dataclass(frozen=True)
class Call:
    """One operator of the schedule.

    kind: "loop", "loss", "queries" (a loop over queries, chosen elsewhere), "mixer" (attention), "scan" or "op";
    reads, makes: memories; keeps: memories that its backward reads, its own results among them; grads: memories of
    inputs that get a gradient, needs: results that bring one;
    cost: of forward and backward; again: it runs again in the backward;
    cheap: neither a product nor a mixer; program: of a loop; chunks: how many it runs in;
    offloads: those of its results that wait for the backward elsewhere;
    savings: what its loop may save inside it; saved: what it does save (names of nodes);
    layer: the number of the layer that it stands in, where modules tell;
    exchanged: bytes that ranks pass on where each has a part of the sequence: keys and values, or a scan's state.
    """

    name: str
    label: str
    kind: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)
    again: bool = False
    cheap: bool = False
    program: Program | None = None
    chunks: int = 1
    offloads: tuple[str, ...] = ()
    savings: tuple[Saving, ...] = ()
    saved: tuple[str, ...] = ()
    layer: int | None = None
    exchanged: int = 0

    def saving(self, level: int) -> Call:
        """The same loop saving what level ``level`` of its savings says (0: nothing inside it)."""
        if level == 0:
            return self
        chosen = self.savings[level - 1]
        names = tuple(saved_name(self.name, value) for value in chosen.values)
        makes, keeps = (*self.makes, *names), (*self.keeps, *names)
        call = replace(self, makes=makes, keeps=keeps, program=chosen.program, saved=chosen.values)
        return call.in_chunks(self.chunks)

    def in_chunks(self, count: int) -> Call:
        """The same loop in another number of chunks."""
        if self.program is None:
            return self
        return replace(self, cost=loop_cost(self.program, self.kind == "loss", count), chunks=count)


@dataclass
class Step:
    """A whole training or inference step: its calls in order, and the bytes of every memory.

    parameters: inputs that get gradients; inputs: the others; outputs: what the graph returns.
    """

    calls: list[Call]
    sizes: dict[str, int]
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    training: bool


def read_step(gm: fx.GraphModule, training: bool, fused: bool = True, kind: str = "") -> Step:
    """The calls of a graph in normal form, loops included.

    fused: as a compiler runs it, which makes cheap values again in the backward rather than keep them;
    kind: of the device that runs it, "cpu" or "cuda"; without it that of the tensors, a GPU where they are on none.
    """
    reader = _Reader(training, kind)
    calls = [_told(c, n) for n in gm.graph.nodes if n.op == "call_function" for c in reader.call(n)]
    placeholders = [n for n in gm.graph.nodes if n.op in ("placeholder", "get_attr")]
    for n in placeholders:
        reader.sizes[n.name] = bytes_of(n.meta.get("val"))
    needing = [n.name for n in placeholders if training and n.meta.get("needs_grad")]
    others = [n.name for n in placeholders if n.name not in needing]
    outputs = [reader.memory(n) for n in gm.graph.output_node().all_input_nodes]
    step = Step(calls, reader.sizes, tuple(needing), tuple(others), tuple(outputs), training)
    if training:
        step = _without_dead_gradients(step)
    return _without_cheap_keeps(step) if training and fused else step


def _told(call: Call, node: fx.Node) -> Call:
    """With its layer, and the results that are tagged to be offloaded."""
    results = node.meta.get("custom", {}).get(OFFLOADED, ())
    return replace(call, offloads=tuple(call.makes[i] for i in results), layer=layer_of(node))


def saved_name(call: str, value: str) -> str:
    """The memory of a value inside a loop that it saves."""
    return f"{call}:{value}"


def with_savings(step: Step, savings: Mapping[str, Sequence[Saving]]) -> Step:
    """The step with what else its loops may save, by the names of the calls."""
    sizes = dict(step.sizes)
    for name, several in savings.items():
        for one in several:
            values = one.program.outputs[-len(one.values) :]
            sizes |= {saved_name(name, n): v.nbytes for n, v in zip(one.values, values, strict=True)}
    calls = [replace(c, savings=tuple(savings.get(c.name, ()))) for c in step.calls]
    return replace(step, calls=calls, sizes=sizes)


class _Reader:
    """Reads nodes as calls, and notes the bytes of every memory that they name."""

    def __init__(self, training: bool, kind: str) -> None:
        self._training, self._kind = training, kind
        self.sizes: dict[str, int] = {}

    def memory(self, node: fx.Node) -> str:
        """The memory that a value lies in."""
        while node.op == "call_function":
            source = node.args[0] if node.args else None
            if node.target is operator.getitem and isinstance(source, fx.Node):
                if not is_view(source):
                    return f"{source.name}:{node.args[1]}"
            elif not (is_view(node) and isinstance(source, fx.Node)):
                return node.name
            assert isinstance(source, fx.Node)
            node = source
        return node.name

    def call(self, node: fx.Node) -> Iterator[Call]:
        if node.target is operator.getitem or is_view(node):
            return
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)):
            makes = {f"{node.name}:{i}": bytes_of(v) for i, v in enumerate(value)}
        else:
            makes = {node.name: bytes_of(value)}
        self.sizes |= makes
        reads = tuple(dict.fromkeys(self.memory(i) for i in node.all_input_nodes))
        if is_loop(node):
            yield self._loop(node, reads, tuple(makes))
        elif is_attention(node):
            yield self._attention(node, reads)
        elif str(node.target) in _SCANS:
            yield self._scan(node, reads, tuple(makes))
        elif node.target is aten.cross_entropy_loss.default:
            yield self._cross_entropy(node, reads, tuple(makes))
        else:
            yield self._op(node, reads, tuple(makes))

    def _grads(self, nodes: Any) -> tuple[str, ...]:
        if not self._training:
            return ()
        return tuple(dict.fromkeys(self.memory(i) for i in nodes if i.meta.get("needs_grad")))

    def _loop(self, node: fx.Node, reads: tuple[str, ...], makes: tuple[str, ...]) -> Call:
        p = program(str(node.args[-1])).example()
        tokens, shared = list(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
        loss = node.target is LOSS_LOOP
        grads = self._grads([*tokens, *shared])
        keeps: list[str] = []
        needs: tuple[str, ...] = ()
        if loss:
            keeps, needs = list(makes[len(p.sums) + len(p.outputs) :]), makes[:1]
        elif p.backward is not None:
            kept = [self.memory(tokens[i]) for i in p.backward.tokens]
            kept += [self.memory(shared[j]) for j in p.backward.shared]
            keeps = [*dict.fromkeys(kept), *(makes[i] for i in p.backward.kept)]
            needs = tuple(makes[i] for i in p.backward.grads)
        again = node.meta.get("recompute") is not None
        kind = "loss" if loss else "loop"
        call = Call(node.name, p.label, kind, reads, makes, tuple(keeps), grads, needs, again=again, program=p)
        return call.in_chunks(p.count)

    def _attention(self, node: fx.Node, reads: tuple[str, ...]) -> Call:
        """Kernels that keep q, k, v, the output and one float per query and head (the log-sum-exp)."""
        out = node.meta["val"]
        q, k, v = (n.meta["val"] for n in node.args[:3])  # type: ignore[union-attr]
        queries = numel(node) // max(hint(out.shape[-1]), 1)
        lse = f"{node.name}:lse"
        self.sizes[lse] = 4 * queries
        keys = hint(k.shape[-2])
        share = 0.5 if window_of(node) is None and is_causal(node) else share_seen(node, keys)
        flops = 4.0 * queries * keys * hint(q.shape[-1]) * share
        moved = float(sum(self.sizes.get(m, 0) for m in reads) + self.sizes[node.name])
        grads = self._grads(node.all_input_nodes)
        return Call(
            node.name,
            "attention",
            "mixer",
            reads,
            (node.name, lse) if grads else (node.name,),
            (*reads, node.name, lse) if grads else (),
            grads,
            (node.name,) if grads else (),
            Cost(workspace_of_attention(node, self._kind or q.device.type), (flops, 2.5 * flops), (moved, 2 * moved)),
            node.meta.get("recompute") is not None,
            exchanged=bytes_of(k) + bytes_of(v),
        )

    def _scan(self, node: fx.Node, reads: tuple[str, ...], makes: tuple[str, ...]) -> Call:
        """Linear attention: it keeps its operands and the states between chunks, its last result."""
        call = self._op(node, reads, makes)
        arguments = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        results = node.meta["val"]
        forward: Any = node.target
        backward = getattr(torch.ops.mstc, f"{forward.overloadpacket.__name__}_backward")
        flops = (
            float(flop_registry[forward.overloadpacket](*arguments, out_val=results)),
            float(flop_registry[backward](results[0], None, *arguments, out_val=None)),
        )
        keeps = (*call.keeps, makes[-1]) if call.grads else ()
        needs = makes[:1] if call.grads else ()
        cost = replace(call.cost, flops=flops)
        label, state = forward.overloadpacket.__name__.replace("_", " "), bytes_of(results[1])
        call = replace(call, label=label, kind="scan", cost=cost, cheap=False, exchanged=state)
        return replace(call, keeps=keeps, needs=needs)

    def _cross_entropy(self, node: fx.Node, reads: tuple[str, ...], makes: tuple[str, ...]) -> Call:
        """It keeps the logarithm of the softmax, and its backward makes one more value of that size."""
        call = self._op(node, reads, makes)
        logits = self.memory(node.all_input_nodes[0])
        size = bytes_of(node.all_input_nodes[0].meta["val"])
        log = f"{node.name}:log"
        self.sizes[log] = size
        keeps = (*(r for r in reads if r != logits), log) if call.grads else ()
        return replace(call, makes=(*makes, log), keeps=keeps, cost=replace(call.cost, work=(0, size)), cheap=False)

    def _op(self, node: fx.Node, reads: tuple[str, ...], makes: tuple[str, ...]) -> Call:
        """Any other op: its backward reads what torch's own derivative saves, or where that is cheap, its inputs."""
        grads = self._grads(node.all_input_nodes)
        differentiable = bool(grads) and bool(node.meta.get("needs_grad"))
        keeps = reads if differentiable and node.target not in _LINEAR else ()
        flops = matmul_flops(node)
        moved = float(sum(self.sizes.get(m, 0) for m in (*reads, *makes)))
        return Call(
            node.name,
            str(node.target).removeprefix("aten.").removesuffix(".default"),
            "op",
            reads,
            makes,
            keeps,
            grads if differentiable else (),
            makes if differentiable else (),
            Cost((0, 0), (flops, 2 * flops), (moved, 2 * moved)),
            node.meta.get("recompute") is not None,
            not is_heavy(node) and node.target is not aten.embedding.default,
        )


# Linear in every operand that gets a gradient: nothing is kept.
_LINEAR = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.clone.default,
    aten._to_copy.default,
    aten.cat.default,
    aten.stack.default,
    aten.pad.default,
)


def _without_dead_gradients(step: Step) -> Step:
    """Calls whose results bring no gradient (behind a ``detach``) have no backward and keep nothing for one."""
    brought = {m for c in step.calls for m in c.needs if m in step.outputs}
    calls = []
    for c in reversed(step.calls):
        if brought.intersection(c.needs):
            brought.update(c.grads)
        else:
            c = replace(c, keeps=(), grads=(), needs=())
        calls.append(c)
    return replace(step, calls=calls[::-1])


def _without_cheap_keeps(step: Step) -> Step:
    """Values that a cheap op makes from others that stay anyway are made again rather than kept."""
    stay = {m for c in step.calls for m in c.keeps} | {*step.parameters, *step.inputs}
    again: set[str] = set()
    for c in reversed(step.calls):
        kept = [m for m in c.makes if m in stay]
        if c.cheap and not c.again and kept and all(r in stay for r in c.reads):
            stay -= set(c.makes)
            again.add(c.name)
    step.calls = [replace(c, again=True) if c.name in again else c for c in step.calls]
    return step
