"""Inductor for code of our own, its settings, and its counters.

`standalone_compile` compiles a graph without Dynamo, guards and autograd around it, `compile_fx_inner` without the
wrapper of AOTAutograd either; that one, the settings and the counters lie in private modules only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, standalone_compile
from torch._inductor import metrics as inductor_metrics
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = [
    "compile_block",
    "compile_by_shape",
    "compile_for",
    "count_auto_chunkings",
    "draws_as_eager",
    "inductor_decompositions",
    "loop_limits",
    "mode_settings",
    "set_activation_memory_budget",
    "unrolled_below",
    "without_cudagraphs",
]


def compile_for(
    function: Callable[..., Any], examples: Sequence[torch.Tensor], threads: int | None = None
) -> Callable[..., Any]:
    """``function`` compiled by Inductor for contiguous tensors of these shapes and dtypes, which no call checks.

    threads: how many its code has; those of torch at this time unless given. A product and its sum are rounded
    once, together (fma), as ``addcmul`` does eagerly; Inductor's default rounds twice.
    """
    with torch.no_grad():
        # A function of its own: annotations on the graph's would keep Inductor's cache from naming it.
        graph = make_fx(lambda *tensors: function(*tensors), tracing_mode="fake")(*examples)
        compiled: Callable[..., Any] = standalone_compile(
            graph,
            list(examples),
            dynamic_shapes="from_example_inputs",
            options={"config_patches": _settings(threads)},
        )
    return compiled


def compile_block(
    function: Callable[..., Any], examples: Sequence[torch.Tensor], threads: int | None = None
) -> Callable[..., Any]:
    """As ``compile_for``, for a function of some 20 us that is called often: calling it takes 9 us instead of 19.

    What allocates and calls its kernels is compiled too, and nothing stands around that: ``function`` may write to
    arguments that it does not read (before torch 2.13 Inductor reads some after they were written), only at its end and
    by ``copy_``, and to nothing else; what it returns are new tensors. No two of the ``examples`` are the same tensor.
    """
    with torch.no_grad(), inductor_config.patch(_settings(threads)):
        graph = make_fx(lambda *tensors: function(*tensors), select_decomp_table(), tracing_mode="fake")(*examples)
        compiled = compile_fx_inner(graph, list(examples), is_inference=True, cpp_wrapper=True)
    return lambda *tensors: compiled(list(tensors))


def _settings(threads: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"size_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}
    return settings if threads is None else settings | {"cpp.threads": threads}


def compile_by_shape(
    function: Callable[..., Any], compiling: Callable[[], contextlib.AbstractContextManager[None]]
) -> Callable[..., Any]:
    """``function`` compiled by Inductor once for each combination of shapes, dtypes and devices that it is called with.

    It takes and returns nested tuples of tensors and None; each time that it is compiled, that happens in a
    ``compiling()`` context. Dynamo would run it uncompiled from the ninth shape on.
    """
    bodies: dict[object, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf.contiguous() for leaf in leaves if leaf is not None]
        forms = [None if leaf is None else (leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        key = (torch.get_num_threads(), *forms)
        if key not in bodies:
            with compiling():
                bodies[key] = _compile_tree(function, [form is not None for form in forms], spec, tensors)
        return bodies[key](*tensors)

    return call


def _compile_tree(
    function: Callable[..., Any], given: Sequence[bool], spec: pytree.TreeSpec, examples: Sequence[torch.Tensor]
) -> Callable[..., Any]:
    """From the tensors among the leaves of ``spec`` (``given``; the others are None) to what ``function`` returns."""
    returned: list[Any] = []

    def fill(tensors: Sequence[torch.Tensor], which: Sequence[bool], tree: pytree.TreeSpec) -> Any:
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if there else None for there in which], tree)

    def flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves, tree = pytree.tree_flatten(function(*fill(tensors, given, spec)))
        returned[:] = [leaf is not None for leaf in leaves], tree
        return tuple(leaf for leaf in leaves if leaf is not None)

    compiled = compile_for(flat, examples)
    return lambda *tensors: fill(compiled(*tensors), *returned)


@contextlib.contextmanager
def without_cudagraphs() -> Iterator[None]:
    """A loop body runs inside an operator, where a CUDA graph of its own cannot be recorded."""
    with inductor_config.patch({"triton.cudagraphs": False}):
        yield


def draws_as_eager() -> bool:
    """Whether Inductor is set to draw eager's random numbers."""
    return bool(inductor_config.fallback_random)


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Inductor's settings behind a ``mode`` of ``torch.compile``; an unknown one raises ``RuntimeError``."""
    return dict(list_mode_options(mode))


class LoopLimits(NamedTuple):
    """What Inductor computes in one loop at most.

    repeated: memories that a value reads, to be computed anew in each of its readers; ops, reads: of a value that is
    not stored, however few read it.
    """

    repeated: int
    ops: int
    reads: int


def loop_limits(on_cpu: bool, settings: Mapping[str, Any] | None = None) -> LoopLimits:
    """The settings behind ``StorageBox.should_realize_on_reuse`` and ``has_exceeded_max_reads``: on a CPU loops are
    longer since torch 2.13, where the settings of all devices, if set, stand above.

    settings: of a graph, above those of the process.
    """

    def setting(name: str) -> Any:
        return (settings or {}).get(name, getattr(inductor_config, name))

    def longest(name: str) -> int:
        of_all = setting(f"realize_{name}")
        if of_all is None:
            of_all = setting(f"realize_cpu_{name}" if on_cpu else f"_realize_{name}_default")
        return int(of_all)

    return LoopLimits(setting("realize_reads_threshold"), longest("opcount_threshold"), longest("acc_reads_threshold"))


def unrolled_below() -> int:
    """From how many terms on Inductor makes a loop of a sum (``Reduction.create``); fewer are written out."""
    return int(inductor_config.unroll_reductions_threshold)


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The ops that Inductor writes as others, before it makes kernels of a graph."""
    return dict(select_decomp_table())


def count_auto_chunkings() -> int:
    """How many graphs Inductor's auto_chunker has rewritten since the last call; it says so nowhere else."""
    count = int(getattr(inductor_metrics, "num_auto_chunking", 0))
    inductor_metrics.num_auto_chunking = 0
    return count


def set_activation_memory_budget(share: float) -> None:
    """What share of the saved bytes Inductor's partitioner may keep (1: all); for this process."""
    functorch_config.activation_memory_budget = share
