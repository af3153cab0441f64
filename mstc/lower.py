"""Lowering: the rewritten graph, and the bodies of its loops, go to Dynamo's own backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from mstc import compat


def lower(gm: fx.GraphModule, inputs: Sequence[Any], name: str) -> Callable[..., Any]:
    """Compile a graph with "inductor", "aot_eager" or "eager"; inputs may be fake."""
    if name == "eager":
        return gm.forward
    compiled: Callable[..., Any] = compat.lower_with(name)(gm, list(inputs))
    return compiled


def body_compiler(name: str) -> Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]:
    """Compiles loop bodies: plain functions of tensors, without gradients, one after another."""

    def compile_body(gm: fx.GraphModule, fakes: Sequence[torch.Tensor]) -> Callable[..., Any]:
        if name == "eager":
            return gm.forward
        mode = compat.fake_mode_of_values(fakes)
        with compat.isolated_tracing(mode), compat.without_cudagraphs(), torch.no_grad():
            return lower(gm, fakes, name)

    return compile_body
