"""Dynamo's own backends, to which a rewritten graph is handed.

Their registry is private, and only a partitioner of our own gets to see forward and backward once they are parted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

__all__ = ["lower_with", "parted", "partitioning_by"]

Edit = Callable[[fx.GraphModule, fx.GraphModule, int], None]


def lower_with(name: str) -> Callable[..., Any]:
    """Dynamo's own backend of that name ("inductor", "aot_eager", "eager")."""
    backend: Callable[..., Any] = lookup_backend(name)
    return backend


def partitioning_by(name: str, edit: Edit, key: str) -> Any:
    """Dynamo's backend "inductor" or "aot_eager", with a look at forward and backward before they are compiled.

    edit: called with both and the number of the forward's own results, which what is saved follows; it may change
    them. key: tells edits apart, for the compiler's caches.
    """
    partition = _Partitioner(edit, key)
    if name == "aot_eager":
        return _op_by_op(boxed_nop, partition)

    def compiled(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        patches = {**more.pop("config_patches", {}), "custom_partitioner_fn": partition}
        backend: Any = lookup_backend(name)
        return backend(gm, inputs, config_patches=patches, **more)

    return compiled


def parted(gm: fx.GraphModule, inputs: Sequence[Any], name: str, edit: Edit | None = None) -> list[fx.GraphModule]:
    """The forward and, where an input requires a gradient, the backward, as "inductor" or "aot_eager" part them.

    Nothing is compiled. inputs: fake tensors; edit: as of `partitioning_by`.
    """
    found: list[fx.GraphModule] = []

    def keep(part: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        found.append(part)
        return boxed_nop(part, list(inputs))

    partition = _Partitioner(edit, "parted") if edit is not None else None
    folding = all(x.device.type != "meta" for x in inputs if isinstance(x, torch.Tensor))
    with functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        if name == "inductor":
            # Folding looks at values, which tensors of no device have none of: whole steps would be constants.
            patches = {"joint_graph_constant_folding": folding, "custom_partitioner_fn": partition}
            compile_fx(gm, list(inputs), inner_compile=keep, config_patches=patches)
        else:
            _op_by_op(keep, partition or min_cut_rematerialization_partition)(gm, list(inputs))
    return found


def _op_by_op(compiler: Callable[..., Any], partition: Callable[..., Any]) -> Any:
    """Dynamo's backend "aot_eager", with another compiler and partitioner."""
    return aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, partition_fn=partition, keep_inference_input_mutations=True
    )


class _Partitioner(CustomPartitionerFn):
    """The partitioner that AOTAutograd and Inductor have by themselves, and then the edit."""

    def __init__(self, edit: Edit, key: str) -> None:
        self._edit, self._key = edit, key

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **more: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(gm, joint_inputs, **more)
        self._edit(forward, backward, int(more["num_fwd_outputs"]))
        for part in (forward, backward):
            part.graph.lint()
            part.recompile()
        return forward, backward

    def uuid(self) -> str:
        return self._key
