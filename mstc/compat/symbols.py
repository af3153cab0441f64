"""Dynamic lengths: the values behind their symbols, symbols of our own, and what was decided about them.

A `ShapeEnv` makes symbols and keeps the conditions (guards) under which a traced or compiled graph is right; public
PyTorch offers neither.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from mstc.compat.fakes import FakeTensorMode

__all__ = ["example_of", "guard_at_most", "keeps_guards", "symbolic_lengths", "unbound_lengths"]


def example_of(size: torch.SymInt, symbol: sympy.Symbol) -> int | None:
    """The value of one of a size's symbols in the call that was captured; None where only a run will tell."""
    env = size.node.shape_env
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # the name before torch 2.13
    value = known.get(symbol)
    return None if value is None else int(value)


def guard_at_most(size: torch.SymInt, most: int) -> None:
    """The captured graph serves calls where the size is no more than that; another call is captured anew.

    Dynamo reads the guards of a graph after its backend has compiled it.
    """
    assert bool(size <= most), f"a size of {size} is more than {most} in the call that was captured"


def symbolic_lengths(examples: Mapping[str, int]) -> tuple[FakeTensorMode, list[torch.SymInt]]:
    """A fake mode of its own with a dynamic length for each name, and the lengths.

    Each is taken to be at least 2, but for those whose example is less: numbers that are no tensor's length.
    """
    env = ShapeEnv()
    found = []
    for name, example in examples.items():
        source = ConstantSource(name)
        number = example < 2
        symbol = env.create_symbol(
            example, source, DimDynamic.DYNAMIC, positive=None if number else True, do_not_specialize_zero_one=number
        )
        found.append(env.create_symintnode(symbol, hint=example, source=source))
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=env), found  # type: ignore[return-value]


def keeps_guards(symbols: Sequence[torch.SymInt], values: Sequence[int]) -> bool:
    """Whether these values agree with all that was decided about `symbolic_lengths` in tracing and compiling."""
    env = symbols[0].node.shape_env
    # As they were made: ``expr`` has what a length was decided to equal in its place.
    known = {s.node._expr: v for s, v in zip(symbols, values, strict=True)}
    lengths = [v for symbol, v in known.items() if symbol.is_positive]
    return min(lengths) >= 2 and all(bool(guard.expr.subs(known)) for guard in env.guards)


def unbound_lengths(mode: FakeTensorMode) -> contextlib.AbstractContextManager[None]:
    """Let ops make lengths that data decide, which no trace is to look up: the lowering traces anew."""
    env = mode.shape_env
    return env.ignore_fresh_unbacked_symbols() if env is not None else contextlib.nullcontext()
