"""Inputs whose values a pass relied on: checked before each call, with the unrewritten graph behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.predicates.constants import Bands, Ramp
from mstc.graph.predicates.marks import mark, marked


class Assumption(Protocol):
    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor about to be passed is the one that was read, unchanged."""


def offered_buffers(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, torch.Tensor]:
    """Inputs that are real buffers of a module: their values may be read, if `guarded` checks them afterwards."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        node: value
        for node, value in zip(placeholders, inputs, strict=True)
        if compat.is_buffer(node)
        and isinstance(value, torch.Tensor)
        and not isinstance(value, compat.FakeTensor)
        and not value.requires_grad
    }


def marked_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Ramp | Bands]:
    """Inputs that another compiled graph made and marked."""
    real = {
        node: marked(value)
        for node, value in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
        if isinstance(value, torch.Tensor) and not isinstance(value, compat.FakeTensor)
    }
    return {node: found for node, found in real.items() if found is not None}


def marking(compiled: Callable[..., Any], marks: Mapping[int, Ramp | Bands]) -> Callable[..., Any]:
    """``compiled``, its outputs at these positions marked with what they hold."""

    def run(*inputs: Any) -> Any:
        outputs = compiled(*inputs)
        for position, values in marks.items():
            mark(outputs[position], values)
        return outputs

    return run


def guarded(
    compiled: Callable[..., Any],
    assumed: Mapping[int, Assumption],
    compile_plain: Callable[[Sequence[Any]], Callable[..., Any]],
) -> Callable[..., Any]:
    """``compiled`` while every assumption holds, else the graph as it was written, compiled when first needed.

    assumed: by position among the inputs.
    """
    plain: list[Callable[..., Any]] = []

    def run(*inputs: Any) -> Any:
        if all(a.holds(inputs[i]) for i, a in assumed.items()):
            return compiled(*inputs)
        if not plain:
            plain.append(compile_plain(inputs))
        return plain[0](*inputs)

    return run
