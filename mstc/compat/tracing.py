"""Graphs retraced into ATen ops: before autograd in functional form, or below it with derivatives written out.

`make_fx` is experimental; functional tensors are private, as are the flags that tell which inputs a function writes to
and the switch that keeps hooks for real tensors away from fake ones.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._dynamo.compiled_autograd import _disable as without_compiled_autograd
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing as without_saved_tensors_hooks
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from mstc.compat import autocast
from mstc.compat.dynamo import autograd_function_apply, data_of, is_checkpoint
from mstc.compat.fakes import FakeTensorMode, fake_mode_of_values, symbolic_kernels
from mstc.compat.ops import OpOverload

__all__ = ["Traced", "trace_flat", "trace_functional"]

# Checkpointed blocks are numbered in order; between two of them passes have so many numbers for blocks of their own.
_BLOCKS = 1 << 20

_block_ids = itertools.count(_BLOCKS, _BLOCKS)


@dataclass(frozen=True)
class Traced:
    """Result of `trace_functional`.

    mutated: positions of the inputs whose values it changes in place; retyped: of those whose shape or strides it does.
    """

    gm: fx.GraphModule
    mutated: list[int]
    retyped: list[int]


def trace_functional(
    gm: fx.GraphModule,
    fakes: Sequence[Any],
    mode: FakeTensorMode,
    function: Callable[..., Any],
    whole: Callable[[OpOverload], bool],
) -> Traced:
    """Retrace a Dynamo graph into functional ATen ops, before autograd.

    Of the ops that are made of others those are kept for which ``whole`` holds. New values of mutated
    inputs follow the graph's own outputs, in the order of ``Traced.mutated``. Autocast, where it is on
    or the graph switches it on, is written out as casts. ``function`` is called in place of
    `autograd_function_apply`.
    """
    switches = autocast.Switches()
    run = _FunctionalRun(autocast.CastingMode(whole), _SourceKeepingInterpreter(gm, switches, function))
    with (
        contextlib.closing(switches),
        _unobserved(),
        mode,
        symbolic_kernels(mode),
        fx.traceback.preserve_node_meta(),
        _writable_dropout(),
        warnings.catch_warnings(),
    ):
        # It says that `mstc::function` stays whole, as it must.
        warnings.filterwarnings("ignore", "At pre-dispatch tracing, we assume that any custom op")
        # `make_fx` takes plain functions only.
        traced = make_fx(lambda *args: run(*args), pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(
            *fakes
        )
    autocast.drop_switches(traced.graph)
    return Traced(traced, run.mutated, run.retyped)


class _FunctionalRun:
    """A graph on functional tensors: its outputs, then the new values of the inputs that it changes."""

    def __init__(self, functional: autocast.CastingMode, graph: fx.Interpreter) -> None:
        self._functional, self._graph = functional, graph
        self.mutated: list[int] = []
        self.retyped: list[int] = []

    def __call__(self, *args: Any) -> list[Any]:
        with self._functional:
            wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a for a in args]
            out = self._graph.run(*wrapped)
            self._note_changes(wrapped)
            written = [_unwrapped(wrapped[i]) for i in self.mutated]
            return [*pytree.tree_map(_unwrapped, pytree.tree_leaves(out)), *written]

    def _note_changes(self, inputs: Sequence[Any]) -> None:
        for i, value in enumerate(inputs):
            if not isinstance(value, FunctionalTensor):
                continue
            if torch._functionalize_has_metadata_mutation(value.elem):
                self.retyped.append(i)
            elif torch._functionalize_has_data_mutation(value.elem):  # type: ignore[attr-defined]
                self.mutated.append(i)


def _unwrapped(value: Any) -> Any:
    if not isinstance(value, FunctionalTensor):
        return value
    torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
    return torch._from_functional_tensor(value.elem)


class _SourceKeepingInterpreter(fx.Interpreter):
    """Runs a Dynamo graph and hands each node's metadata (source line, module path) on.

    Calling ``gm.forward`` would lose it. A checkpointed block's body is run in place, each of
    its nodes tagged for recomputation as AOTAutograd would tag it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        switches: autocast.Switches,
        function: Callable[..., Any],
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(gm)
        self._switches, self._function = switches, function
        self._tags = dict(tags or {})

    def run_node(self, n: fx.Node) -> Any:
        n.meta.update(self._tags)
        with fx.traceback.set_current_meta(n):
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if autocast.is_switch(target):
            return self._switches.call(target, args)
        if target is autograd_function_apply:
            return self._function(*args, **kwargs)
        if target is data_of:
            return args[0].detach()  # itself it dispatches nothing, so nothing would be recorded
        if target is torch.Tensor or isinstance(target, type(torch.FloatTensor)):
            return _made_by_type(target, args)
        if not is_checkpoint(target):
            return super().call_function(target, args, kwargs)
        body, *operands = args
        tags = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_block_ids)}
        return _SourceKeepingInterpreter(body, self._switches, self._function, tags).run(*operands)


def _made_by_type(kind: Any, args: tuple[Any, ...]) -> Any:
    """``torch.Tensor([1.0])``, ``torch.LongTensor(4)``: values given, or sizes. Its own call would leave no values."""
    dtype = torch.get_default_dtype() if kind is torch.Tensor else kind.dtype
    if len(args) == 1 and not isinstance(args[0], int | torch.SymInt):
        return torch.tensor(args[0], dtype=dtype)
    return torch.empty(*args, dtype=dtype)


@contextlib.contextmanager
def _writable_dropout() -> Iterator[None]:
    """``export=True`` freezes what dropout returns, so that writing to it raises; it is a tensor like any other."""
    plain = torch._freeze_functional_tensor  # type: ignore[attr-defined]
    torch._freeze_functional_tensor = lambda x: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._freeze_functional_tensor = plain  # type: ignore[attr-defined]


@contextlib.contextmanager
def _unobserved() -> Iterator[None]:
    """What watches the caller's autograd sees nothing of the tracing, as under AOTAutograd: no hook of saved tensors
    (a checkpoint around the compiled function) gets a fake one, and anomaly mode looks for no nan in it.
    """
    with without_saved_tensors_hooks(), torch.autograd.set_detect_anomaly(torch.is_anomaly_enabled(), check_nan=False):
        yield


def trace_flat(
    function: Callable[..., Any], fakes: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """Trace ``function`` over fake tensors below autograd; what it differentiates is recorded as plain ops."""
    # Inside the fake mode, since derivative formulas make constants of their own. Compiled autograd, where it is on,
    # would take a gradient that is asked for meanwhile for a graph of its own.
    mode = fake_mode_of_values(fakes)
    with _unobserved(), mode, symbolic_kernels(mode), without_compiled_autograd():
        return make_fx(
            function,
            decomposition_table=dict(decompositions or {}),
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)
