"""Every private PyTorch API that mstc uses, each with its reason.

Versions checked: 2.13 by running; 2.11 and 2.12 by reading their sources. Nothing else in
mstc may import a private name of torch (a test holds this).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._decomp import get_decompositions
from torch._dynamo import config as dynamo_config
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.compiled_autograd import _disable as without_compiled_autograd
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._dynamo.symbolic_convert import TensorifyState
from torch._functorch import config as functorch_config
from torch._functorch.autograd_function import autograd_function_apply
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import CompileContext, TracingContext, tracing
from torch._higher_order_ops.wrap import TagActivationCheckpoint
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, standalone_compile
from torch._inductor import metrics as inductor_metrics
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._logging._internal import trace_log, trace_structured
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.symbol import SymT, symbol_is_type
from torch.utils.checkpoint import CheckpointPolicy

from mstc import compat_autocast

__all__ = [
    "BLOCKS",
    "Captured",
    "CheckpointPolicy",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "Traced",
    "allocating_by",
    "autograd_function_apply",
    "capture",
    "compile_by_shape",
    "compile_for",
    "compile_name",
    "count_auto_chunkings",
    "data_of",
    "draws_as_eager",
    "example_of",
    "fake_inputs",
    "fake_mode_of",
    "fake_mode_of_values",
    "get_decompositions",
    "input_kind",
    "input_name",
    "is_buffer",
    "is_checkpoint",
    "is_grad_mode_switch",
    "is_transform_switch",
    "isolated_tracing",
    "keeps_guards",
    "lower_with",
    "mode_settings",
    "name_constants",
    "partitioning_by",
    "references",
    "set_activation_memory_budget",
    "symbolic_lengths",
    "trace_artifact",
    "trace_flat",
    "trace_functional",
    "trace_with_constants",
    "tracing_to_file",
    "tree_leaves",
    "vmap_step",
    "without_cudagraphs",
]

SUPPORTED_TORCH = ((2, 11), (2, 13))

# Checkpointed blocks are numbered in order; between two of them passes have so many numbers for blocks of their own.
BLOCKS = 1 << 20

_block_ids = itertools.count(BLOCKS, BLOCKS)

tree_leaves = pytree.tree_leaves
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


def fake_mode_of(values: Sequence[object]) -> FakeTensorMode:
    """The fake mode of the running compilation, or that of the first fake tensor in ``values``."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_inputs(placeholders: Sequence[fx.Node], inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Fake versions of a backend's example inputs.

    A backend gets real tensors, but fake ones under DDP's optimizer. The tracing context's
    symbolic context and source go along: without them new symbols and guards would appear.
    """
    context = TracingContext.try_get()
    fakes: list[Any] = []
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, FakeTensor) and value.fake_mode is mode:
            fakes.append(value)
        elif isinstance(value, torch.Tensor):
            symbolic = context.tensor_to_context.get(value) if context is not None else None  # type: ignore[no-untyped-call]
            source = symbolic.tensor_source if symbolic is not None else None
            fakes.append(mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False))
        else:
            fakes.append(node.meta.get("example_value", value))
    return fakes


class _SourceKeepingInterpreter(fx.Interpreter):
    """Runs a Dynamo graph and hands each node's metadata (source line, module path) on.

    Calling ``gm.forward`` would lose it. A checkpointed block's body is run in place, each of
    its nodes tagged for recomputation as AOTAutograd would tag it.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        autocast: compat_autocast.Switches,
        function: Callable[..., Any],
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(gm)
        self._autocast, self._function = autocast, function
        self._tags = dict(tags or {})

    def run_node(self, n: fx.Node) -> Any:
        n.meta.update(self._tags)
        with fx.traceback.set_current_meta(n):
            return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if compat_autocast.is_switch(target):
            return self._autocast.call(target, args)
        if target is autograd_function_apply:
            return self._function(*args, **kwargs)
        if target is data_of:
            return args[0].detach()  # itself it dispatches nothing, so nothing would be recorded
        if not is_checkpoint(target):
            return super().call_function(target, args, kwargs)
        body, *operands = args
        tags = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_block_ids)}
        return _SourceKeepingInterpreter(body, self._autocast, self._function, tags).run(*operands)


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


class Traced:
    """Result of `trace_functional`: the graph, and which inputs it changes in place."""

    def __init__(self, gm: fx.GraphModule, mutated: list[int], retyped: list[int]) -> None:
        self.gm = gm
        self.mutated = mutated
        self.retyped = retyped


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
    functional = compat_autocast.CastingMode(whole)
    switches = compat_autocast.Switches()
    mutated: list[int] = []
    retyped: list[int] = []

    def unwrap(value: Any) -> Any:
        if not isinstance(value, FunctionalTensor):
            return value
        torch._sync(value)  # type: ignore[attr-defined, no-untyped-call]
        return torch._from_functional_tensor(value.elem)

    def run(*args: Any) -> Any:
        with functional:
            wrapped = [FunctionalTensor.to_functional(a) if isinstance(a, torch.Tensor) else a for a in args]
            out = _SourceKeepingInterpreter(gm, switches, function).run(*wrapped)
            for i, value in enumerate(wrapped):
                if not isinstance(value, FunctionalTensor):
                    continue
                if torch._functionalize_has_metadata_mutation(value.elem):
                    retyped.append(i)
                elif torch._functionalize_has_data_mutation(value.elem):  # type: ignore[attr-defined]
                    mutated.append(i)
            written = [unwrap(wrapped[i]) for i in mutated]
            return [*pytree.tree_map(unwrap, pytree.tree_leaves(out)), *written]

    with (
        contextlib.closing(switches),
        mode,
        fx.traceback.preserve_node_meta(),
        _writable_dropout(),
        warnings.catch_warnings(),
    ):
        # It says that `mstc::function` stays whole, as it must.
        warnings.filterwarnings("ignore", "At pre-dispatch tracing, we assume that any custom op")
        traced = make_fx(run, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*fakes)
    compat_autocast.drop_switches(traced.graph)
    return Traced(traced, mutated, retyped)


@contextlib.contextmanager
def _writable_dropout() -> Iterator[None]:
    """``export=True`` freezes what dropout returns, so that writing to it raises; it is a tensor like any other."""
    plain = torch._freeze_functional_tensor  # type: ignore[attr-defined]
    torch._freeze_functional_tensor = lambda x: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._freeze_functional_tensor = plain  # type: ignore[attr-defined]


class Captured:
    """One graph that Dynamo handed to a backend, and why the function's graph ends there ("" where it returns)."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        found: Any = getattr(gm, "compile_subgraph_reason", None)
        reason = found if found is not None and found.graph_break else None
        self.gm, self.inputs = gm, inputs
        self.broken = str(reason.reason) if reason else ""
        frame = reason.user_stack[-1] if reason and reason.user_stack else None
        self.source = f"{frame.filename}:{frame.lineno}" if frame is not None else ""


def capture(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], seen: Callable[[Captured], None]
) -> None:
    """Let Dynamo trace a call of ``fn`` and hand each graph to ``seen``; no graph runs.

    Code between two graphs runs as Python, on zeros in place of their values. Other compilations of the same
    function stay as they are: each call counts as a backend of its own, and the limits on recompilations are lifted.
    """
    limits = {"recompile_limit": 1 << 20, "accumulated_recompile_limit": 1 << 20, "fail_on_recompile_limit_hit": True}

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        seen(Captured(gm, inputs))
        output = gm.graph.output_node()
        values = [n.meta["example_value"] if isinstance(n, fx.Node) else n for n in tree_leaves(output.args[0])]
        mode = next((i.fake_mode for i in inputs if isinstance(i, FakeTensor)), None)
        training = torch.is_grad_enabled()
        return lambda *_: [_stand_in(v, mode, training) for v in values]

    with dynamo_config.patch(limits):
        try:
            torch.compile(fn, backend=backend, dynamic=False)(*args, **kwargs)
        except BackendCompilerFailed as e:
            raise e.inner_exception from None


def _stand_in(value: Any, mode: FakeTensorMode | None, training: bool) -> Any:
    """Zeros like a fake value that take no memory, in the given fake mode if any."""
    if not isinstance(value, torch.Tensor):
        return hint if (hint := getattr(getattr(value, "node", None), "hint", None)) is not None else value
    shape = [s if isinstance(s, int) else s.node.hint for s in value.shape]
    with mode or contextlib.nullcontext():
        zeros = torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)
    return zeros.requires_grad_(training and value.requires_grad)


def trace_flat(
    function: Callable[..., Any], fakes: Sequence[Any], decompositions: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule:
    """Trace ``function`` over fake tensors below autograd; what it differentiates is recorded as plain ops."""
    # Inside the fake mode, since derivative formulas make constants of their own. Compiled autograd, where it is on,
    # would take a gradient that is asked for meanwhile for a graph of its own.
    with fake_mode_of_values(fakes), without_compiled_autograd():
        return make_fx(
            function,
            decomposition_table=dict(decompositions or {}),
            tracing_mode="real",
            _allow_non_fake_inputs=True,
        )(*fakes)


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
        patches: dict[str, Any] = {"size_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}
        if threads is not None:
            patches["cpp.threads"] = threads
        compiled: Callable[..., Any] = standalone_compile(
            graph, list(examples), dynamic_shapes="from_example_inputs", options={"config_patches": patches}
        )
    return compiled


def compile_by_shape(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by Inductor once for each combination of shapes, dtypes and devices that it is called with.

    It takes and returns nested tuples of tensors and None. Dynamo would run it uncompiled from the ninth shape on.
    """
    bodies: dict[object, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(args)
        tensors = [leaf.contiguous() for leaf in leaves if leaf is not None]
        forms = [None if leaf is None else (leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        key = (torch.get_num_threads(), *forms)
        if key not in bodies:
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
def isolated_tracing(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """A tracing context of its own, so that compiling a body inside a backend leaves the outer one alone."""
    with tracing(TracingContext(mode) if mode is not None else None):
        yield


def fake_mode_of_values(values: Sequence[object]) -> FakeTensorMode:
    """The fake mode of the first fake tensor in ``values``, whatever compilation is running."""
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


@contextlib.contextmanager
def without_cudagraphs() -> Iterator[None]:
    """A loop body runs inside an operator, where a CUDA graph of its own cannot be recorded."""
    with inductor_config.patch({"triton.cudagraphs": False}):
        yield


def example_of(size: torch.SymInt, symbol: sympy.Symbol) -> int | None:
    """The value of one of a size's symbols in the call that was captured; None where only a run will tell."""
    env = size.node.shape_env
    known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val  # the name before torch 2.13
    value = known.get(symbol)
    return None if value is None else int(value)


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
    known = {s.node.expr: v for s, v in zip(symbols, values, strict=True)}
    lengths = [v for s, v in zip(symbols, values, strict=True) if s.node.expr.is_positive]
    return min(lengths) >= 2 and all(bool(guard.expr.subs(known)) for guard in env.guards)


@contextlib.contextmanager
def allocating_by(empty_strided: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Code that Inductor writes meanwhile asks ``empty_strided(shape, stride, dtype)`` for its CPU buffers.

    Its wrapper binds ``torch._C._dynamo.guards._empty_strided_cpu`` when it is loaded, and offers no other hook. A
    wrapper that was loaded before (the same code in another graph) keeps the allocator it has: slower, never wrong.
    """
    guards: Any = torch._C._dynamo.guards
    plain = guards._empty_strided_cpu
    guards._empty_strided_cpu = empty_strided
    try:
        yield
    finally:
        guards._empty_strided_cpu = plain


def references(storage: torch.UntypedStorage) -> int:
    """How many tensors and Python objects share a storage's memory (public PyTorch does not tell)."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def draws_as_eager() -> bool:
    """Whether Inductor is set to draw eager's random numbers."""
    return bool(inductor_config.fallback_random)


def partitioning_by(name: str, edit: Callable[[fx.GraphModule, fx.GraphModule, int], None], key: str) -> Any:
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


class _Partitioner(CustomPartitionerFn):
    """Inductor's own partitioner, and then the edit."""

    def __init__(self, edit: Callable[[fx.GraphModule, fx.GraphModule, int], None], key: str) -> None:
        self._edit, self._key = edit, key

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **more: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return _edited(min_cut_rematerialization_partition(gm, joint_inputs, **more), self._edit, more)

    def uuid(self) -> str:
        return self._key


def _edited(
    parts: tuple[fx.GraphModule, fx.GraphModule],
    edit: Callable[[fx.GraphModule, fx.GraphModule, int], None],
    more: Mapping[str, Any],
) -> tuple[fx.GraphModule, fx.GraphModule]:
    forward, backward = parts
    edit(forward, backward, int(more["num_fwd_outputs"]))
    for part in parts:
        part.graph.lint()
        part.recompile()
    return forward, backward


def mode_settings(mode: str | None) -> dict[str, Any]:
    """Inductor's settings behind a ``mode`` of ``torch.compile``; an unknown one raises ``RuntimeError``."""
    return dict(list_mode_options(mode))


def count_auto_chunkings() -> int:
    """How many graphs Inductor's auto_chunker has rewritten since the last call; it says so nowhere else."""
    count = int(getattr(inductor_metrics, "num_auto_chunking", 0))
    inductor_metrics.num_auto_chunking = 0
    return count


def set_activation_memory_budget(share: float) -> None:
    """What share of the saved bytes Inductor's partitioner may keep (1: all); for this process."""
    functorch_config.activation_memory_budget = share


def name_constants(gm: fx.GraphModule) -> None:
    """Give a graph's own tensor constants a source.

    AOTAutograd asks one of every tensor in a module that came from Dynamo, to guard on inputs that are the same tensor.
    """
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        own = (name for name, _ in gm.named_buffers(remove_duplicate=False))
        gm._param_name_to_source = {**{name: ConstantSource(name) for name in own}, **sources}  # type: ignore[assignment]


def compile_name() -> str:
    """``graph 0/1``: the number of the compilation that is running, as TORCH_LOGS and tlparse write it; "" outside."""
    running = CompileContext.current_compile_id()
    return f"graph {running}" if running is not None else ""


def tracing_to_file() -> bool:
    """Whether ``TORCH_TRACE`` collects artifacts."""
    return bool(os.environ.get("TORCH_TRACE")) and bool(trace_log.handlers)


def trace_artifact(name: str, text: str) -> None:
    """Hand a text to ``TORCH_TRACE``, where tlparse shows it beside the graph that is being compiled."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def lower_with(name: str) -> Callable[..., Any]:
    """Dynamo's own backend of that name ("inductor", "aot_eager", "eager"); the registry is private."""
    backend: Callable[..., Any] = lookup_backend(name)
    return backend
