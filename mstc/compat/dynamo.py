"""What Dynamo writes into a graph, and what it is told from inside a backend.

- The switches of grad mode and function transforms, checkpointed blocks, ``x.data`` and ``autograd.Function`` stand in
  its graphs as private functions and ops (`data_of`, `autograd_function_apply`, ``is_...``).
- Only a node's ``_dynamo_source`` tells whether an input is a parameter, a buffer or an argument.
- Constants that a backend adds need a source, or AOTAutograd fails on them (`name_constants`).
- Only an exception of its own makes Dynamo trace again (`trace_with_constants`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._functorch.autograd_function import autograd_function_apply
from torch._guards import TracingContext
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch.utils._sympy.symbol import SymT, symbol_is_type

__all__ = [
    "autograd_function_apply",
    "copy_source",
    "copy_sources",
    "data_of",
    "input_kind",
    "input_name",
    "is_buffer",
    "is_checkpoint",
    "is_grad_mode_switch",
    "is_transform_switch",
    "name_constants",
    "trace_with_constants",
    "vmap_step",
]

data_of = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]  # what Dynamo calls for ``x.data``


def is_grad_mode_switch(node: fx.Node) -> bool:
    """``torch._C._set_grad_enabled``: how Dynamo writes ``torch.no_grad()`` into a graph."""
    return node.op == "call_function" and node.target is torch._C._set_grad_enabled


def is_transform_switch(node: fx.Node) -> bool:
    """Parts of ``vmap``, ``grad`` and other function transforms, which stand as calls of their own in a graph."""
    return str(getattr(node.target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch"))


def vmap_step(node: fx.Node) -> int | None:
    """1 where Dynamo's graph switches ``vmap`` on, -1 where it is off again, 0 where it is prepared; else None."""
    steps = {"_vmap_increment_nesting": 1, "_vmap_decrement_nesting": -1, "lazy_load_decompositions": 0}
    return steps.get(getattr(node.target, "__name__", "")) if is_transform_switch(node) else None


def is_checkpoint(target: object) -> bool:
    """The higher-order op into which Dynamo turns ``torch.utils.checkpoint``."""
    return isinstance(target, TagActivationCheckpoint)


def copy_source(old: fx.Node, new: fx.Node) -> None:
    """Let an input's copy in another graph tell where Dynamo took it from, as the input does."""
    if hasattr(old, "_dynamo_source"):
        new._dynamo_source = old._dynamo_source


def copy_sources(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """The same for the parameters of a graph, which AOTAutograd looks up by their names."""
    if hasattr(old, "_param_name_to_source"):
        new._param_name_to_source = old._param_name_to_source


def input_name(node: fx.Node) -> str:
    """How Dynamo reaches an input, as ``L['self']._modules['a']._parameters['weight']``; "" where it does not tell."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)


def input_kind(node: fx.Node) -> str:
    """ "parameter", "buffer" or "input", by where Dynamo took it from."""
    name = input_name(node)
    return "parameter" if "_parameters[" in name else "buffer" if "_buffers[" in name else "input"


def is_buffer(node: fx.Node) -> bool:
    """Whether Dynamo took this input from a module's buffers (it keeps the input's source on the node)."""
    return input_kind(node) == "buffer"


def name_constants(gm: fx.GraphModule) -> None:
    """Give a graph's own tensor constants a source.

    AOTAutograd asks one of every tensor in a module that came from Dynamo, to guard on inputs that are the same tensor.
    """
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        own = (name for name, _ in gm.named_buffers(remove_duplicate=False))
        gm._param_name_to_source = {**{name: ConstantSource(name) for name in own}, **sources}  # type: ignore[assignment]


def trace_with_constants(numbers: Sequence[torch.SymFloat]) -> None:
    """Have Dynamo trace the function again with these floats, or what they are made of, as guarded constants.

    As AOTAutograd asks for it. Floats that it cannot make constants of (made of lengths or of tensors) stay.
    """
    symbols = {s for n in numbers for s in n.node.expr.free_symbols if symbol_is_type(s, SymT.FLOAT)}
    asked = [str(s) for s in symbols if not TensorifyState.should_specialize(str(s))]
    for name in asked:
        TensorifyState.specialize(name)
    if asked and TracingContext.try_get() is not None:
        raise TensorifyScalarRestartAnalysis
