"""What the kernels of attention hold besides their operands and results, on the CPU and on GPUs."""

from __future__ import annotations

import math

import torch
import torch.fx as fx

from mstc.graph.attention import WINDOW_ATTENTION, vectors_of
from mstc.graph.costs import bytes_of, hint
from mstc.ops.attention_shape import SHAPE_BACKWARD
from mstc.ops.loop import is_loop
from mstc.ops.window_attention import BACKWARD, FORWARD, block_rows

aten = torch.ops.aten
_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_GPU_BACKWARD = (
    aten._scaled_dot_product_flash_attention_backward.default,
    aten._scaled_dot_product_efficient_attention_backward.default,
    aten._scaled_dot_product_cudnn_attention_backward.default,
    SHAPE_BACKWARD,
)


def workspace_of_attention(node: fx.Node, kind: str) -> tuple[int, int]:
    """Of scaled dot product attention, forward and backward, on a device of this kind, "cpu" or "cuda"."""
    q, k, v = (n.meta["val"] for n in node.args[:3])  # type: ignore[union-attr]
    if node.target is WINDOW_ATTENTION:
        window, causal = node.args[3:5]
        assert isinstance(window, int)
        return _window(q, k, v, window, bool(causal), any(vectors_of(node)), kind)
    if kind != "cpu":
        return 0, _gpu(q, k, v)
    forward, backward = _of_cpu(q)
    return forward, backward + _copied_gradient(node)


def workspace_of_kernel(node: fx.Node, kind: str) -> int:
    """Of one of the kernels that attention is made of below autograd, 0 for anything else."""
    if node.target is _CPU:
        return _of_cpu(_value(node, 0))[0]
    if node.target is _CPU_BACKWARD:
        gradient = _value(node, 0)
        return _of_cpu(_value(node, 1))[1] + (0 if gradient.transpose(1, 2).is_contiguous() else bytes_of(gradient))
    if node.target in _GPU_BACKWARD:
        q, k, v = (_value(node, i) for i in (1, 2, 3))
        return _of_cpu(q)[1] if kind == "cpu" else _gpu(q, k, v)
    if node.target in (FORWARD, BACKWARD):
        at = 0 if node.target is FORWARD else 1
        q, k, v = (_value(node, i) for i in range(at, at + 3))
        window, causal, _, *beside = node.args[-5:]
        assert isinstance(window, int)
        return _window(q, k, v, window, bool(causal), any(beside), kind)[at]
    return 0


def _value(node: fx.Node, at: int) -> torch.Tensor:
    operand = node.args[at]
    assert isinstance(operand, fx.Node)
    value: torch.Tensor = operand.meta["val"]
    return value


def _of_cpu(q: torch.Tensor) -> tuple[int, int]:
    return _cpu(hint(q.shape[-2]), hint(q.shape[-1]))


def _cpu(rows: int, width: int) -> tuple[int, int]:
    """Of the flash kernels (ATen/native/cpu/FlashAttentionKernel.cpp): each thread has its own."""
    block = 256 if rows >= 768 else 64 if rows >= 192 else 32
    wide = 4 * torch.get_num_threads()
    return wide * block * (512 + 2 + width), wide * 2 * block * 512


def _copied_gradient(node: fx.Node) -> int:
    """The CPU's backward copies a gradient whose tokens do not lie outside its heads; a loop's gradient for attention
    lies as its result does."""
    out = node.meta["val"]
    by_loop = any(map(is_loop, node.users))
    heads_inside = out.dim() == 4 and out.transpose(1, 2).is_contiguous()
    return bytes_of(out) if by_loop and not heads_inside else 0


def _gpu(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    """Of the flash kernels' backward (ATen/native/transformers/cuda/flash_attn/flash_api.cpp, `mha_bwd`): one float32
    per query and head; in half precision the gradient of the queries in float32; where heads share keys and values,
    gradients of these for every head. The memory-efficient kernels, which serve float32 and masks, need no more.
    """
    heads = math.prod(hint(s) for s in q.shape[:-2])
    rows, width = _rounded(hint(q.shape[-2]), 128), hint(q.shape[-1])
    sums = 4 * heads * rows
    if q.dtype.itemsize != 2:
        return sums
    accumulated = 4 * heads * rows * _rounded(width, 32 if width <= 128 else 64)
    shared = heads // max(math.prod(hint(s) for s in k.shape[:-2]), 1)
    expanded = shared * (bytes_of(k) + bytes_of(v)) if shared > 1 else 0
    return sums + accumulated + expanded


def _window(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, causal: bool, masked: bool, kind: str
) -> tuple[int, int]:
    """Of attention to a window (`mstc.ops.window_attention`): on a GPU in half precision that of flash kernels; in
    blocks of queries the mask of one (of each sequence where documents or hidden keys are ``masked``), what the CPU's
    kernels or the products hold and make, and sums in float32."""
    if kind != "cpu" and q.dtype.itemsize == 2 and not masked:
        return 0, _gpu(q, k, v)
    batch, heads, length, width = (hint(s) for s in q.shape)
    rows = min(block_rows(window), length)
    keys = min(rows + (window - 1) * (1 if causal else 2), length)
    queries, others = batch * heads * rows, batch * hint(k.shape[1]) * keys
    wide, size = max(q.dtype.itemsize, 4), q.dtype.itemsize
    sums = 0 if size == wide else 2 * wide * batch * hint(k.shape[1]) * length * width
    mask = size * rows * keys + (masked * batch * rows * keys * (size + 2))  # its booleans, twice while they are joined
    result, gradients = size * queries * (width + 1), size * (queries + 2 * others) * width
    if kind == "cpu":
        forward, backward = _cpu(rows, width)
        return mask + result + forward, mask + gradients + backward + sums
    scores = wide * queries * keys
    return mask + result + 2 * scores, mask + gradients + 3 * scores + sums


def _rounded(size: int, grain: int) -> int:
    return -(-size // grain) * grain
