"""Dynamo's own backends, to which a rewritten graph is handed.

Their registry is private, and only a partitioner of our own gets to see forward and backward once they are parted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    if name == "aot_eager":

        def partition(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            return _edited(min_cut_rematerialization_partition(gm, inputs, **more), edit, more)

        return aot_autograd(
            fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partition, keep_inference_input_mutations=True
        )

    def compiled(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        patches = {**more.pop("config_patches", {}), "custom_partitioner_fn": _Partitioner(edit, key)}
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

    def partition(gm: fx.GraphModule, inputs: Sequence[Any], **more: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        parts = min_cut_rematerialization_partition(gm, inputs, **more)
        return _edited(parts, edit, more) if edit is not None else parts

    folding = all(x.device.type != "meta" for x in inputs if isinstance(x, torch.Tensor))
    with functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
        if name == "inductor":
            # Folding looks at values, which tensors of no device have none of: whole steps would be constants.
            patches: dict[str, Any] = {"joint_graph_constant_folding": folding}
            if edit is not None:
                patches["custom_partitioner_fn"] = _Partitioner(edit, "parted")
            compile_fx(gm, list(inputs), inner_compile=keep, config_patches=patches)
        else:
            lowered: Any = aot_autograd(
                fw_compiler=keep, bw_compiler=keep, partition_fn=partition, keep_inference_input_mutations=True
            )
            lowered(gm, list(inputs))
    return found


class _Partitioner(CustomPartitionerFn):
    """Inductor's own partitioner, and then the edit."""

    def __init__(self, edit: Edit, key: str) -> None:
        self._edit, self._key = edit, key

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **more: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return _edited(min_cut_rematerialization_partition(gm, joint_inputs, **more), self._edit, more)

    def uuid(self) -> str:
        return self._key


def _edited(
    parts: tuple[fx.GraphModule, fx.GraphModule],
    edit: Edit,
    more: Mapping[str, Any],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    forward, backward = parts
    edit(forward, backward, int(more["num_fwd_outputs"]))
    for part in parts:
        part.graph.lint()
        part.recompile()
    return forward, backward
