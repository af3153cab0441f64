"""Loop programs: what one loop op runs, and the registry from which the op fetches it by key."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import sympy
import torch

from mstc.errors import LoopError
from mstc.graph.precision import at_least_float32
from mstc.graph.sizes import Size, evaluate
from mstc.ops.body import Value
from mstc.ops.dynamic import Body, DynamicBodies, apart
from mstc.ops.joint import Backward
from mstc.ops.pieces import balanced

Bodies = Mapping[int, Body]  # by the length of the chunk


@dataclass(frozen=True)
class BodyCosts:
    """Of a chunk of ``length`` indices, forward and backward: FLOPs, most bytes at once (inputs left out), kernels,
    bytes of the largest value.

    live: where freed memory goes back at once; pooled: where it waits for the next chunk (`mstc.ops.workspace`).
    """

    length: int = 1
    flops: tuple[float, float] = (0.0, 0.0)
    live: tuple[int, int] = (0, 0)
    pooled: tuple[int, int] = (0, 0)
    kernels: tuple[int, int] = (1, 1)
    largest: tuple[int, int] = (0, 0)

    def held(self, count: int) -> tuple[int, int]:
        """The most bytes at once in a loop of so many chunks."""
        return self.live if count == 1 else self.pooled


@dataclass(frozen=True)
class Program:
    """Everything that a loop op needs at run time.

    n: length of the axis; count: number of chunks (in the example, where the length is dynamic); tokens, shared,
    outputs, sums: the whole tensors;
    token_needs, shared_needs: which inputs get gradients: those that need one and that one reaches;
    forward: compiled bodies by chunk length (empty where a loss's gradients come with it); backward: how the
    ``backward_bodies`` are called, None in inference;
    accumulate: "float32" or "param", for sums over chunks of shared inputs' gradients;
    lengths: the dynamic lengths that sizes are made of, whose values come with each call; where there are any,
    chunks have at most ``longest`` indices, however many that makes, and `at` gives the program of one call;
    examples: their values in the graph's example;
    measure: counts what a chunk of the longest length costs; only plans, reports and FLOP counters ask.
    """

    key: str
    label: str
    n: Size
    count: int
    tokens: tuple[Value, ...]
    shared: tuple[Value, ...]
    outputs: tuple[Value, ...]
    sums: tuple[Value, ...]
    token_needs: tuple[bool, ...]
    shared_needs: tuple[bool, ...]
    forward: Bodies
    backward_bodies: Bodies
    backward: Backward | None
    accumulate: str
    measure: Callable[[], BodyCosts] = BodyCosts
    lengths: tuple[sympy.Symbol, ...] = ()
    examples: tuple[int, ...] = ()
    longest: int = 0
    dynamic: DynamicBodies | None = None

    @cached_property
    def costs(self) -> BodyCosts:
        return apart(self.measure)

    def flops(self, values: Sequence[int] = ()) -> tuple[float, float]:
        """FLOPs of the matrix products of a whole call, forward and backward, for these dynamic lengths."""
        n = self.n if self.dynamic is None else evaluate(self.n, dict(zip(self.lengths, values, strict=True)))
        forward, backward = (x * int(n) / self.costs.length for x in self.costs.flops)
        return forward, backward

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """(start, length) of the chunks."""
        return balanced(self.n, self.count)

    def example(self) -> Program:
        """The program for the lengths that the graph was captured with."""
        return self.at(self.examples)

    def at(self, values: Sequence[int]) -> Program:
        """The same for a call with these dynamic lengths."""
        if self.dynamic is None:
            return self
        known = dict(zip(self.lengths, values, strict=True))
        n = int(evaluate(self.n, known))

        def at(whole: tuple[Value, ...]) -> tuple[Value, ...]:
            return tuple(v.at(known) for v in whole)

        forward, backward = self.dynamic.at(values)
        return replace(
            self,
            n=n,
            count=max(-(-n // self.longest), 1),
            tokens=at(self.tokens),
            shared=at(self.shared),
            outputs=at(self.outputs),
            sums=at(self.sums),
            forward=forward,
            backward_bodies=backward,
            lengths=(),
            dynamic=None,
        )

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return at_least_float32(dtype) if self.accumulate == "float32" else dtype


_programs: dict[str, Program] = {}
_lock = threading.Lock()


def register(program: Program) -> None:
    with _lock:
        _programs[program.key] = program


def program(key: str) -> Program:
    """The program of that key.

    Raises `LoopError` where it is gone: after ``torch._dynamo.reset()``, or in another process.
    """
    found = _programs.get(key)
    if found is None:
        raise LoopError(
            f"no loop body is known under {key}: the graph was compiled in another process or before "
            "torch._dynamo.reset(); call the compiled function anew so that it is compiled here"
        )
    return found


def known(key: str) -> bool:
    return key in _programs


def clear() -> None:
    """Forget all programs (``torch._dynamo.reset()`` does this)."""
    with _lock:
        _programs.clear()
