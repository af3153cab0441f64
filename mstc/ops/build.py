"""From a region to a registered loop program: trace its bodies, compile them once per distinct body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.costs import UNKNOWN_LENGTH, is_heavy, matmul_flops, nbytes
from mstc.graph.live import peaks_of
from mstc.graph.regions import Region
from mstc.graph.results import returned_by
from mstc.graph.sizes import size, symbols_of
from mstc.graph.text import canonical_text, digest
from mstc.graph.views import any_strides, is_view
from mstc.ops import program as programs
from mstc.ops.body import LENGTH, Value, dynamic_lengths, forward_body, with_lengths
from mstc.ops.class_sums import use_class_sums
from mstc.ops.dynamic import Body, DynamicBodies
from mstc.ops.joint import Backward, BackwardBody, Fakes, Joint, Needs, backward_body, trace_joint
from mstc.ops.pieces import balanced
from mstc.ops.program import BodyCosts, Program
from mstc.ops.where_read import compute_where_read

# Part of every key: what the compiler caches under a loop's name holds for this code of the ops only.
_CODE = digest(*(f.read_text(encoding="utf-8") for f in sorted(Path(__file__).parent.glob("*.py"))))
Compiler = Callable[[fx.GraphModule, Sequence[Any]], Body]


@dataclass(frozen=True)
class Recipe:
    """How a region is to run.

    count: number of chunks; longest: most indices in a chunk where the length is dynamic;
    training: whether gradients are recorded; kept: for each output, whether it
    is kept anyway; loss: gradients are computed in the forward; accumulate: see `Program`;
    mode: whatever else tells bodies apart (lowering, determinism); fused: whether the lowering fuses pointwise ops;
    saves: how many of the outputs, the last ones, are there for the backward alone.
    """

    count: int
    longest: int
    training: bool
    kept: tuple[bool, ...]
    loss: bool
    accumulate: str
    mode: str
    label: str
    fused: bool = False
    saves: int = 0


def build(region: Region, recipe: Recipe, compiler: Compiler) -> Program:
    """The loop program of a region; identical regions share one, compiled at its first use."""
    builder = _Builder(region, recipe, compiler)
    lengths = dynamic_lengths(region)
    body = forward_body(region, None if lengths else {LENGTH: builder.static_lengths()[0]})
    key = "mstc_" + digest(canonical_text(body.graph), builder.values(), builder.needs, region.n, recipe, _CODE)
    if programs.known(key):
        return programs.program(key)
    made = builder.dynamic(key, lengths) if lengths else builder.static(key)
    programs.register(made)
    return made


def joint_of(region: Region, recipe: Recipe) -> Joint | None:
    """A region's body for its longest chunk with its vector-Jacobian product; None where nothing is differentiable."""
    builder = _Builder(region, recipe, _never)
    at = builder.example()
    return builder.joint(forward_body(region, at.values), at)[-1]


def costs_of(region: Region, recipe: Recipe) -> BodyCosts:
    """What a chunk of the longest length will cost: traced, not compiled."""
    builder = _Builder(region, recipe, _never)
    at = builder.example()
    return builder.costs(forward_body(region, at.values), at)


def _never(gm: fx.GraphModule, inputs: Sequence[Any]) -> Body:
    raise AssertionError("this body is not to be compiled")


@dataclass(frozen=True)
class _Lengths:
    """What a body is made for.

    values: the chunk's length and the dynamic lengths, as numbers, or as symbols of ``mode``; inputs: the symbols
    that the body takes as inputs.
    """

    mode: compat.FakeTensorMode
    values: Mapping[sympy.Symbol, Any]
    inputs: Sequence[torch.SymInt] = ()

    @staticmethod
    def of(values: Mapping[sympy.Symbol, int]) -> _Lengths:
        """Numbers."""
        return _Lengths(compat.FakeTensorMode(allow_non_fake_inputs=True), values)


@dataclass(frozen=True)
class _Cost:
    """What one body costs: FLOPs, most bytes at once (without and with a pool), kernels, bytes of the largest value."""

    flops: float = 0.0
    live: int = 0
    pooled: int = 0
    kernels: int = 0
    largest: int = 0

    @staticmethod
    def of(gm: fx.GraphModule, fused: bool, kept: bool) -> _Cost:
        """fused: by Inductor, which writes some ops as others first; kept: whether freed memory waits for the next
        chunk."""
        made = [n for n in gm.graph.nodes if n.op == "call_function" and not is_view(n)]
        # A compiled body's kernels: its products, and between two of them about one that all the rest is fused into.
        kernels = 2 * sum(map(is_heavy, gm.graph.nodes)) + 1
        flops = sum(map(matmul_flops, gm.graph.nodes))
        live, pooled = peaks_of(_as_inductor_writes(gm) if fused else gm, fused)
        return _Cost(flops, live, pooled if kept else live, kernels, max(map(nbytes, made), default=0))


def _as_inductor_writes(gm: fx.GraphModule) -> fx.GraphModule:
    """The same function of the ops that Inductor makes kernels of, with the graph's settings."""
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    with any_strides(gm):
        written = compat.trace_flat(gm, inputs, compat.inductor_decompositions())
    written.meta.update(gm.meta)
    return written


@dataclass(frozen=True)
class _Traced:
    """A forward body and a backward body (where there is one), and the fakes of inputs and results."""

    mode: compat.FakeTensorMode
    body: fx.GraphModule
    fakes: Fakes
    backward: BackwardBody | None

    def costs(self, length: int, fused: bool) -> BodyCosts:
        """What forward and backward body cost for chunks of that length."""
        inputs = self.fakes.inputs()
        kept = fused and bool(inputs) and inputs[0].device.type == "cpu"
        with compat.isolated_tracing(self.mode):
            a, b = _Cost.of(compat.trace_flat(self.body, inputs), fused, kept), _Cost()
            if self.backward is not None:
                b = _Cost.of(self.backward.gm, fused, kept)
                products, factors = self._product_flops(self.backward), len(self.backward.call.factors)
                b = replace(b, flops=b.flops + products, kernels=b.kernels + factors)
        live, pooled, largest = (a.live, b.live), (a.pooled, b.pooled), (a.largest, b.largest)
        return BodyCosts(length, (a.flops, b.flops), live, pooled, (a.kernels, b.kernels), largest)

    @staticmethod
    def _product_flops(body: BackwardBody) -> float:
        """Of the products dy^T x, which the loop computes from what the backward body returns."""
        returned = returned_by(body.gm.graph)
        pairs = [(returned[f.x].meta["val"], returned[f.dy].meta["val"]) for f in body.call.factors]
        return float(sum(2 * x.numel() * dy.shape[-1] for x, dy in pairs))


@dataclass(frozen=True)
class _Bodies:
    """Compiled bodies for one set of lengths, and what they came from."""

    forward: Body | None
    backward: Body | None
    traced: _Traced


class _Builder:
    """Traces and compiles the bodies of one region."""

    def __init__(self, region: Region, recipe: Recipe, compiler: Compiler) -> None:
        self.region, self.recipe, self.compiler = region, recipe, compiler
        self.tokens = tuple(Value.of(n, p) for n, p in region.tokens)
        self.shared = tuple(Value.of(n, None) for n in region.shared)
        self.outputs = tuple(Value.of(n, p) for n, p in region.outputs)
        self.sums = tuple(Value.of(n, None) for n in region.sums)
        returned = len(region.outputs) - recipe.saves
        self.saved = range(returned, len(region.outputs))
        results = self._needs((*(n for n, _ in region.outputs), *region.sums))
        self.needs = Needs(
            self._needs(n for n, _ in region.tokens),
            self._needs(region.shared),
            tuple(need and i not in self.saved for i, need in enumerate(results)),
        )

    def _needs(self, nodes: Iterable[fx.Node]) -> tuple[bool, ...]:
        return tuple(self.recipe.training and bool(n.meta.get("needs_grad")) for n in nodes)

    @property
    def differentiable(self) -> bool:
        return any(self.needs.results) and any((*self.needs.tokens, *self.needs.shared))

    def values(self) -> tuple[tuple[Value, ...], ...]:
        return self.tokens, self.shared, self.outputs, self.sums

    def static_lengths(self) -> list[int]:
        """The chunk lengths that occur, longest first."""
        chunks = balanced(int(self.region.n), self.recipe.count)
        return sorted({length for _, length in chunks}, reverse=True)

    def example(self) -> _Lengths:
        """The longest chunk of the call that was captured."""
        if not dynamic_lengths(self.region):
            return _Lengths.of({LENGTH: self.static_lengths()[0]})
        return _Lengths.of({**examples_of(self.region), LENGTH: max(self.recipe.longest, 2)})

    def costs(self, body: fx.GraphModule, at: _Lengths) -> BodyCosts:
        """What a chunk costs: traced, not compiled."""
        return self.trace(body, at).costs(at.values[LENGTH], self.recipe.fused)

    def static(self, key: str) -> Program:
        """One body for each chunk length."""
        made = {}
        for length in self.static_lengths():
            at = _Lengths.of({LENGTH: length})
            made[length] = self._compile(forward_body(self.region, at.values), at)
        general = next(iter(made.values())).traced.backward
        backward = {length: _as_laid_out(b, general) for length, b in made.items()}
        program = self._program(
            key,
            general,
            {length: b.forward for length, b in made.items() if b.forward is not None},
            {length: body for length, body in backward.items() if body is not None},
        )
        longest = next(iter(made))
        return replace(program, measure=partial(made[longest].traced.costs, longest, self.recipe.fused))

    def dynamic(self, key: str, lengths: tuple[sympy.Symbol, ...]) -> Program:
        """One symbolic body, which takes the lengths as inputs."""
        names = (*lengths, LENGTH)
        example = self.example()
        examples = example.values
        mode, symints = compat.symbolic_lengths({str(s): examples[s] for s in names})
        body = forward_body(self.region, None)
        made = self._compile(body, _Lengths(mode, dict(zip(names, symints, strict=True)), symints))

        def special(values: Sequence[int]) -> tuple[Body | None, Body | None]:
            own = self._compile(with_lengths(body, values), _Lengths.of(dict(zip(names, values, strict=True))))
            return own.forward, _as_laid_out(own, made.traced.backward)

        def measure() -> BodyCosts:
            return self.costs(with_lengths(body, [examples[s] for s in names]), example)

        bodies = DynamicBodies(made.forward, made.backward, partial(compat.keeps_guards, symints), special)
        program = self._program(key, made.traced.backward, {}, {})
        known = tuple(examples[s] for s in lengths)
        return replace(
            program, lengths=lengths, examples=known, longest=self.recipe.longest, dynamic=bodies, measure=measure
        )

    def _compile(self, body: fx.GraphModule, at: _Lengths) -> _Bodies:
        """The compiled bodies for these lengths."""
        t = self.trace(body, at)
        forward = None if self.recipe.loss and t.backward is not None else self.compiler(t.body, t.fakes.inputs())
        if t.backward is None:
            return _Bodies(forward, None, t)
        return _Bodies(forward, self.compiler(t.backward.gm, t.fakes.inputs_of(t.backward.call)), t)

    def trace(self, body: fx.GraphModule, at: _Lengths) -> _Traced:
        """The bodies for these lengths, the backward's where there is one, and the fakes they were traced with."""
        fakes, joint = self.joint(body, at)
        made = None
        if joint is not None:
            with compat.isolated_tracing(at.mode):
                made = self._backward_body(joint, fakes)
        if self.recipe.fused and not (self.recipe.loss and made is not None):
            with compat.isolated_tracing(at.mode):
                body = compute_where_read(body, fakes.inputs())
        return _Traced(at.mode, body, fakes, made)

    def _backward_body(self, joint: Joint, fakes: Fakes) -> BackwardBody:
        """Of a joint graph, written for a lowering that fuses where there is one."""
        made = backward_body(joint, self.recipe.kept, self.saved, with_values=self.recipe.loss)
        if not self.recipe.fused:
            return made
        use_class_sums(made.gm.graph)
        made.gm.recompile()
        return replace(made, gm=compute_where_read(made.gm, fakes.inputs_of(made.call)))

    def joint(self, body: fx.GraphModule, at: _Lengths) -> tuple[Fakes, Joint | None]:
        """Fakes of the inputs and of the results, and the joint graph of a body where a gradient goes through it."""

        def fakes(values: Iterable[Value]) -> list[torch.Tensor]:
            return [v.fake(at.mode, at.values) for v in values]

        found = Fakes(fakes(self.tokens), fakes(self.shared), fakes((*self.outputs, *self.sums)), at.inputs)
        if not self.differentiable:
            return found, None
        with compat.isolated_tracing(at.mode):
            made = trace_joint(body, found, self.needs)
        return found, made if made.differentiates else None

    def _program(
        self, key: str, body: BackwardBody | None, forward: dict[int, Body], backward: dict[int, Body]
    ) -> Program:
        recipe = self.recipe
        call = body.call if body is not None else None
        token_needs, shared_needs = (False,) * len(self.tokens), (False,) * len(self.shared)
        if call is not None:
            token_needs, shared_needs = tuple(map(bool, call.token_sources)), tuple(map(bool, call.shared_sources))
        return Program(
            key,
            recipe.label,
            self.region.n,
            recipe.count,
            self.tokens,
            self.shared,
            self.outputs,
            self.sums,
            token_needs,
            shared_needs,
            forward,
            backward,
            call,
            recipe.accumulate,
        )


def examples_of(region: Region) -> dict[sympy.Symbol, int]:
    """The lengths that the graph was captured with."""
    found: dict[sympy.Symbol, int | None] = {}
    nodes = (*region.nodes, *region.sums)
    for node in dict.fromkeys((*nodes, *(i for n in nodes for i in n.all_input_nodes))):
        value = node.meta.get("val")
        for s in value.shape if isinstance(value, torch.Tensor) else [value]:
            if isinstance(s, torch.SymInt):
                found |= {symbol: compat.example_of(s, symbol) for symbol in symbols_of([size(s)])}
    return {s: UNKNOWN_LENGTH if (e := found.get(s)) is None else e for s in dynamic_lengths(region)}


def _as_laid_out(own: _Bodies, general: BackwardBody | None) -> Body | None:
    """The backward body for special lengths, called as the general one is, its results in the places of that one's.

    With its lengths known a body may read fewer inputs, and the same node may serve as two results: a sum over a
    chunk of one token is that token's value.
    """
    run = own.backward
    if own.traced.backward is None or general is None or run is None or own.traced.backward.call == general.call:
        return run
    a, b = own.traced.backward.call, general.call
    taken = _inputs_of(a, b)
    pairs = [(a.token_grads[i], at) for i, at in b.token_grads.items()]
    pairs += [(a.shared_grads[j], at) for j, at in b.shared_grads.items()]
    pairs += [p for x, y in zip(a.factors, b.factors, strict=True) for p in ((x.x, y.x), (x.dy, y.dy))]
    pairs += list(zip(a.values, b.values, strict=True))
    places = {at: found for found, at in pairs}
    return lambda *args: _pick(run(*(args[i] for i in taken)), places)


def _inputs_of(own: Backward, general: Backward) -> list[int]:
    """Where what a body for special lengths reads stands among what the general one is called with."""
    taken, start = [], 0
    pairs = (own.tokens, general.tokens), (own.shared, general.shared), (own.kept, general.kept)
    for reads, there in (*pairs, (own.grads, general.grads)):
        assert set(reads) <= set(there), "a body for special lengths reads other inputs"
        taken += [start + there.index(i) for i in reads]
        start += len(there)
    return taken


def _pick(results: Sequence[Any], places: Mapping[int, int]) -> list[Any]:
    return [results[places[i]] if i in places else None for i in range(max(places, default=-1) + 1)]
