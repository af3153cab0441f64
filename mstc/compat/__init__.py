"""Every private PyTorch API that mstc uses, each with its reason, by theme.

Versions checked: 2.11, 2.12 and 2.13, by running the tests (on the CPU). Nothing else in mstc may import a private
name of torch (a test holds this).

The modules `autocast`, `building` and `errors` are used by name; what the others offer stands here as well.
"""

from mstc.compat.attention import (
    cpu_attention,
    cpu_attention_backward,
    flash_window,
    flash_window_backward,
    has_flash_window,
)
from mstc.compat.captured import Captured, capture
from mstc.compat.dynamo import (
    autograd_function_apply,
    copy_source,
    copy_sources,
    data_of,
    input_kind,
    input_name,
    is_buffer,
    is_checkpoint,
    is_grad_mode_switch,
    is_transform_switch,
    name_constants,
    trace_with_constants,
    vmap_step,
)
from mstc.compat.fakes import (
    FakeTensor,
    FakeTensorMode,
    beside_real_tensors,
    fake_inputs,
    fake_mode_of,
    fake_mode_of_values,
    isolated_tracing,
    symbolic_kernels,
)
from mstc.compat.inductor import (
    compile_block,
    compile_by_shape,
    compile_for,
    count_auto_chunkings,
    draws_as_eager,
    inductor_decompositions,
    loop_limits,
    mode_settings,
    set_activation_memory_budget,
    unrolled_below,
    without_cudagraphs,
)
from mstc.compat.logs import compile_name, trace_artifact, tracing_to_file
from mstc.compat.lowering import lower_with, parted, partitioning_by
from mstc.compat.memory import allocating_by, references
from mstc.compat.ops import HigherOrderOperator, OpOverload, TorchDispatchMode, get_decompositions, tree_leaves
from mstc.compat.products import multiplying_by, onednn_product
from mstc.compat.symbols import example_of, guard_at_most, keeps_guards, symbolic_lengths, unbound_lengths
from mstc.compat.tracing import Traced, trace_flat, trace_functional

__all__ = [
    "Captured",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "Traced",
    "allocating_by",
    "autograd_function_apply",
    "beside_real_tensors",
    "capture",
    "compile_block",
    "compile_by_shape",
    "compile_for",
    "compile_name",
    "copy_source",
    "copy_sources",
    "count_auto_chunkings",
    "cpu_attention",
    "cpu_attention_backward",
    "data_of",
    "draws_as_eager",
    "example_of",
    "fake_inputs",
    "fake_mode_of",
    "fake_mode_of_values",
    "flash_window",
    "flash_window_backward",
    "get_decompositions",
    "guard_at_most",
    "has_flash_window",
    "inductor_decompositions",
    "input_kind",
    "input_name",
    "is_buffer",
    "is_checkpoint",
    "is_grad_mode_switch",
    "is_transform_switch",
    "isolated_tracing",
    "keeps_guards",
    "loop_limits",
    "lower_with",
    "mode_settings",
    "multiplying_by",
    "name_constants",
    "onednn_product",
    "parted",
    "partitioning_by",
    "references",
    "set_activation_memory_budget",
    "symbolic_kernels",
    "symbolic_lengths",
    "trace_artifact",
    "trace_flat",
    "trace_functional",
    "trace_with_constants",
    "tracing_to_file",
    "tree_leaves",
    "unbound_lengths",
    "unrolled_below",
    "vmap_step",
    "without_cudagraphs",
]
