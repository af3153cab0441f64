"""The loop ops: ``mstc::loop`` with its backward, and ``mstc::loss_loop``.

    mstc::loop(tokens, shared, lengths, key) -> [outputs..., sums...]
        runs the body chunk by chunk; its backward runs one joint body per chunk, in reverse.
    mstc::loss_loop(tokens, shared, seeds, lengths, key) -> [sums..., outputs..., gradients...]
        a region whose differentiable sums all meet in one scalar: the gradients for the incoming gradients
        ``seeds``, one per sum, are computed along with the sums and scaled by ``incoming / seeds`` in the backward.

Both are pure functions of their inputs; what they run is fetched from the registry by ``key``. ``lengths`` are the
values of the dynamic lengths that the program's sizes are made of: none where the graph is static.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.profiler import record_function

from mstc.compat.autocast import no_autocast
from mstc.errors import LoopError
from mstc.graph.precision import at_least_float32
from mstc.ops.accumulate import Accumulators
from mstc.ops.body import Value
from mstc.ops.joint import Backward
from mstc.ops.pieces import dense, empty, order_of
from mstc.ops.program import Program, program
from mstc.ops.workspace import workspace

Tensors = Sequence[torch.Tensor]
Lengths = Sequence[Any]  # values of a program's dynamic lengths: ints, or SymInts while the graph is traced

torch.library.define("mstc::loop", "(Tensor[] tokens, Tensor[] shared, SymInt[] lengths, str key) -> Tensor[]")
torch.library.define(
    "mstc::loop_backward",
    "(Tensor?[] grads, Tensor[] tokens, Tensor[] shared, Tensor[] kept, SymInt[] lengths, str key) -> Tensor[]",
)
torch.library.define(
    "mstc::loss_loop", "(Tensor[] tokens, Tensor[] shared, Tensor[] seeds, SymInt[] lengths, str key) -> Tensor[]"
)

LOOP, LOSS_LOOP = torch.ops.mstc.loop.default, torch.ops.mstc.loss_loop.default


def is_loop(node: fx.Node) -> bool:
    """Whether a node calls one of the two."""
    return node.target in (LOOP, LOSS_LOOP)


# -- reading and writing chunks ------------------------------------------------------------------


def _allocate(value: Value) -> torch.Tensor:
    return empty(value.shape, value.order, value.dtype, value.device)


@dataclass(frozen=True)
class _Chunk:
    """``length`` of the ``n`` indices of the axis, from ``start`` on."""

    n: int
    start: int
    length: int

    def read(self, x: torch.Tensor, value: Value) -> torch.Tensor:
        """The chunk of a tensor (the whole of one that is not cut), dense."""
        piece = x if value.cut is None else value.cut.read(x, self.n, self.start, self.length)
        return dense(piece, value.order)

    def read_gradient(self, gradient: torch.Tensor | None, value: Value) -> torch.Tensor:
        """The chunk of an incoming gradient; zeros where there is none."""
        if gradient is None:
            return empty(value.chunk(self.length), value.order, value.dtype, value.device).zero_()
        return self.read(gradient, value)

    def write(self, x: torch.Tensor, value: Value, piece: torch.Tensor | None) -> None:
        """Store a piece; zeros where there is none."""
        assert value.cut is not None
        if piece is None:
            value.cut.view(x, self.n, self.start, self.length).zero_()
        else:
            value.cut.write(x, self.n, self.start, self.length, piece)


def _chunks(p: Program) -> list[_Chunk]:
    return [_Chunk(p.n, start, length) for start, length in p.chunks]


class _Sums:
    """Sums over chunks, at least in float32."""

    def __init__(self, values: Sequence[Value]) -> None:
        self._values = values
        self._totals: list[torch.Tensor | None] = [None] * len(values)

    def add(self, parts: Tensors) -> None:
        for i, part in enumerate(parts):
            total = self._totals[i]
            if total is not None:
                total.add_(part)
            else:
                wide = at_least_float32(part.dtype)
                self._totals[i] = torch.empty(part.shape, dtype=wide, device=part.device).copy_(part)

    def results(self) -> list[torch.Tensor]:
        found = zip(self._totals, self._values, strict=True)
        return [t.to(v.dtype) for t, v in found if t is not None]


class _Gradients:
    """Gradients of a loop's inputs, chunk by chunk: of tokens written, of shared inputs added up."""

    def __init__(self, p: Program, call: Backward) -> None:
        self._program, self._call = p, call
        self._tokens = {i: _allocate(p.tokens[i]) for i in _needing(p.token_needs)}
        self._shared = Accumulators(p, call)

    def add(self, chunk: _Chunk, results: Tensors) -> None:
        """Take what the backward body returned for a chunk."""
        for i, whole in self._tokens.items():
            at = self._call.token_grads.get(i)
            chunk.write(whole, self._program.tokens[i], results[at] if at is not None else None)
        self._shared.add(results)

    def results(self) -> list[torch.Tensor]:
        """Of the inputs that need them, tokens first."""
        return [*self._tokens.values(), *(self._shared.result(j) for j in _needing(self._program.shared_needs))]


# -- mstc::loop ----------------------------------------------------------------------------------


@torch.library.impl("mstc::loop", "CompositeExplicitAutograd")
def _loop(tokens: Tensors, shared: Tensors, lengths: Lengths, key: str) -> list[torch.Tensor]:
    p = program(key).at(lengths)
    with record_function(f"mstc::{p.label}"), torch.no_grad(), no_autocast(), workspace(p.count > 1):
        whole = [dense(s, v.order) for s, v in zip(shared, p.shared, strict=True)]
        outputs = [_allocate(v) for v in p.outputs]
        sums = _Sums(p.sums)
        for chunk in _chunks(p):
            pieces = [chunk.read(t, v) for t, v in zip(tokens, p.tokens, strict=True)]
            results = p.forward[chunk.length](*pieces, *whole)
            for out, value, piece in zip(outputs, p.outputs, results, strict=False):
                chunk.write(out, value, piece)
            sums.add(results[len(outputs) :])
        return [*outputs, *sums.results()]


def _loop_fake(tokens: Tensors, shared: Tensors, lengths: Lengths, key: str) -> list[torch.Tensor]:
    p = program(key)
    return [_fake(p, v, lengths) for v in (*p.outputs, *p.sums)]


@torch.library.impl("mstc::loop_backward", "CompositeExplicitAutograd")
def _loop_backward(
    grads: Sequence[torch.Tensor | None],
    tokens: Tensors,
    shared: Tensors,
    kept: Tensors,
    lengths: Lengths,
    key: str,
) -> list[torch.Tensor]:
    p = program(key).at(lengths)
    b = _backward_of(p)
    with record_function(f"mstc::{p.label} backward"), torch.no_grad(), no_autocast(), workspace(p.count > 1):
        token_values = [p.tokens[i] for i in b.tokens]
        whole = [dense(s, p.shared[j].order) for s, j in zip(shared, b.shared, strict=True)]
        results_values = [*p.outputs, *p.sums]
        gradients = _Gradients(p, b)
        for chunk in reversed(_chunks(p)):
            pieces = [chunk.read(t, v) for t, v in zip(tokens, token_values, strict=True)]
            saved = [chunk.read(k, p.outputs[i]) for k, i in zip(kept, b.kept, strict=True)]
            incoming = [chunk.read_gradient(grads[i], results_values[i]) for i in b.grads]
            results = p.backward_bodies[chunk.length](*pieces, *whole, *saved, *incoming)
            del pieces, saved, incoming
            gradients.add(chunk, results)
            del results
        return gradients.results()


def _loop_backward_fake(
    grads: Sequence[torch.Tensor | None],
    tokens: Tensors,
    shared: Tensors,
    kept: Tensors,
    lengths: Lengths,
    key: str,
) -> list[torch.Tensor]:
    return _fake_gradients(program(key), lengths)


def _fake(p: Program, value: Value, lengths: Lengths) -> torch.Tensor:
    return _allocate(value.at(dict(zip(p.lengths, lengths, strict=True))))


def _fake_gradients(p: Program, lengths: Lengths) -> list[torch.Tensor]:
    """Of the inputs that need them, laid out as they are."""
    wanted = [p.tokens[i] for i in _needing(p.token_needs)] + [p.shared[j] for j in _needing(p.shared_needs)]
    return [_fake(p, v, lengths) for v in wanted]


torch.library.register_fake("mstc::loop", _loop_fake)
torch.library.register_fake("mstc::loop_backward", _loop_backward_fake)


def _needing(needs: Sequence[bool]) -> list[int]:
    return [i for i, need in enumerate(needs) if need]


def _backward_of(p: Program) -> Backward:
    if p.backward is None:
        raise LoopError(
            f"the loop {p.label} was compiled for inference, but a gradient is asked of it; "
            "call the compiled function with gradients enabled so that it is compiled anew"
        )
    return p.backward


def _loop_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tokens, shared, lengths, key = inputs
    p = program(key)
    ctx.key, ctx.lengths = key, lengths
    ctx.set_materialize_grads(False)
    if p.backward is None:
        return
    b = p.backward
    ctx.save_for_backward(*(tokens[i] for i in b.tokens), *(shared[j] for j in b.shared), *(output[i] for i in b.kept))


def _loop_vjp(ctx: Any, grads: Sequence[torch.Tensor | None]) -> Any:
    p = program(ctx.key)
    b = _backward_of(p)
    if all(g is None for g in grads):
        return [None] * len(p.tokens), [None] * len(p.shared), _no_gradients(ctx.lengths), None
    saved = ctx.saved_tensors
    a, c = len(b.tokens), len(b.tokens) + len(b.shared)
    found = iter(
        torch.ops.mstc.loop_backward(
            list(grads), list(saved[:a]), list(saved[a:c]), list(saved[c:]), ctx.lengths, ctx.key
        )
    )
    gradients = []
    for need, sources in zip((*p.token_needs, *p.shared_needs), (*b.token_sources, *b.shared_sources), strict=True):
        gradient = next(found) if need else None
        # None too where no result that the input leads to has a gradient.
        gradients.append(gradient if any(grads[i] is not None for i in sources) else None)
    return gradients[: len(p.tokens)], gradients[len(p.tokens) :], _no_gradients(ctx.lengths), None


def _no_gradients(lengths: Sequence[object]) -> list[None] | None:
    """What stands for the lengths among gradients: an empty list counts as one of tensors, any other as one value."""
    return None if lengths else []


torch.library.register_autograd("mstc::loop", _loop_vjp, setup_context=_loop_setup)


# -- mstc::loss_loop -----------------------------------------------------------------------------


@torch.library.impl("mstc::loss_loop", "CompositeExplicitAutograd")
def _loss_loop(tokens: Tensors, shared: Tensors, seeds: Tensors, lengths: Lengths, key: str) -> list[torch.Tensor]:
    p = program(key).at(lengths)
    b = _backward_of(p)
    with record_function(f"mstc::{p.label}"), torch.no_grad(), no_autocast(), workspace(p.count > 1):
        token_values = [p.tokens[i] for i in b.tokens]
        token_inputs = [tokens[i] for i in b.tokens]
        whole = [dense(shared[j], p.shared[j].order) for j in b.shared]
        outputs = [_allocate(v) for v in p.outputs]
        sums, gradients = _Sums(p.sums), _Gradients(p, b)
        incoming = [_seed_of(p, i, seeds) for i in b.grads]
        for chunk in _chunks(p):
            pieces = [chunk.read(t, v) for t, v in zip(token_inputs, token_values, strict=True)]
            results = p.backward_bodies[chunk.length](*pieces, *whole, *incoming)
            values = [results[i] for i in b.values]
            for out, value, piece in zip(outputs, p.outputs, values, strict=False):
                chunk.write(out, value, piece)
            sums.add(values[len(outputs) :])
            gradients.add(chunk, results)
            del results, values, pieces
        return [*sums.results(), *outputs, *gradients.results()]


def _seed_of(p: Program, result: int, seeds: Tensors) -> torch.Tensor:
    at = result - len(p.outputs)
    value = p.sums[at]
    return dense(seeds[at].to(value.dtype).expand(value.shape), value.order)


def _loss_loop_fake(tokens: Tensors, shared: Tensors, seeds: Tensors, lengths: Lengths, key: str) -> list[torch.Tensor]:
    p = program(key)
    return [*(_fake(p, v, lengths) for v in (*p.sums, *p.outputs)), *_fake_gradients(p, lengths)]


torch.library.register_fake("mstc::loss_loop", _loss_loop_fake)


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, seeds, _, key = inputs
    p = program(key)
    ctx.key = key
    ctx.set_materialize_grads(False)
    first = len(p.sums) + len(p.outputs)
    ctx.save_for_backward(*seeds, *output[first:])


def _loss_vjp(ctx: Any, grads: Sequence[torch.Tensor | None]) -> Any:
    p = program(ctx.key)
    seeds, unit = ctx.saved_tensors[: len(p.sums)], ctx.saved_tensors[len(p.sums) :]
    if any(g is not None for g in grads[len(p.sums) :]):
        raise LoopError(f"the loop {p.label} gives gradients of its loss only")
    pairs = [(g, s) for g, s in zip(grads, seeds, strict=False) if g is not None]
    if not pairs:
        return [None] * len(p.tokens), [None] * len(p.shared), [None] * len(p.sums), _no_gradients(p.lengths), None
    ratio = _ratio(pairs)
    scaled = iter([_scaled(u, ratio) for u in unit])
    token_grads = [next(scaled) if need else None for need in p.token_needs]
    shared_grads = [next(scaled) if need else None for need in p.shared_needs]
    return token_grads, shared_grads, [None] * len(p.sums), _no_gradients(p.lengths), None


def _scaled(x: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """``x * ratio``, its dimensions taken in the order they have in memory: so a compiler reuses the buffer."""
    order = order_of(x)
    back = [order.index(d) for d in range(x.dim())]
    return (x.permute(order) * ratio.to(x.dtype)).permute(back)


def _ratio(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The r with incoming = r * seed for all pairs: exactly 1 where they are equal, 0 where the seeds are all zero."""
    seeds = torch.cat([s.expand(g.shape).reshape(-1) for g, s in pairs])
    incoming = torch.cat([g.to(seeds.dtype).reshape(-1) for g, _ in pairs])
    largest = seeds.abs().max()
    seeds = seeds / torch.where(largest == 0, 1, largest)
    square = (seeds * seeds).sum()
    ratio = (incoming * seeds).sum() / torch.where(square == 0, 1, square)
    return ratio / torch.where(largest == 0, 1, largest)


torch.library.register_autograd("mstc::loss_loop", _loss_vjp, setup_context=_loss_setup)


# -- no second derivatives -----------------------------------------------------------------------


def _no_second(ctx: Any, *grads: Any) -> Any:
    raise LoopError(
        "a gradient of a gradient was asked of a loop; run that function without mstc, "
        'or with options={"mini_sequence": False, "lm_head": False, "query_chunks": False}'
    )


def _no_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    return None


torch.library.register_autograd("mstc::loop_backward", _no_second, setup_context=_no_context)
