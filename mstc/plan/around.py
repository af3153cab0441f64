"""What is left around the loops: whether a compiler has anything to gain there.

Where a model is loops and attention, and little else, the graph that calls them has nothing to fuse: a compiler takes
time for every further layer there and gives none of it back. Such a graph runs op by op, as AOTAutograd parts it.
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.attention import is_attention
from mstc.graph.costs import attention_flops, matmul_flops, nbytes
from mstc.graph.editor import has_order
from mstc.graph.views import is_view
from mstc.ops.loop import is_loop
from mstc.ops.program import program
from mstc.ops.saved import offloads_of
from mstc.options import Options

# A device does at most some hundreds of FLOPs while it moves a byte, so that reading and writing one byte in this many
# FLOPs costs it a few hundredths of its time, if it cannot be saved at all.
FLOPS_PER_BYTE = 10_000
# What is held unfused is to be a small part of what is held anyway: inputs, and what loops and attention make.
PART_OF_HELD = 1 / 4


def lowered_around(gm: fx.GraphModule, options: Options, mode: str | None = None) -> str:
    """What runs the rewritten graph where its loops' compiler does not, else ""; a ``mode`` is for all."""
    chosen = options.lower == "inductor" and mode in (None, "default") and not offloads_of(gm)
    return "aot_eager" if chosen and nothing_to_fuse(gm) else ""


def nothing_to_fuse(gm: fx.GraphModule) -> bool:
    """Whether loops and attention are all that counts in a graph: by bytes against FLOPs, and by bytes against what the
    graph holds. Random ops, writes and what is no ATen op are the compiler's in any case."""
    flops, held, around = 0.0, 0, 0
    loops = False
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            held += nbytes(node)
        elif is_loop(node):
            loops = True
            called = program(node.args[-1]).example()
            flops += called.flops()[0]
            held += sum(value.nbytes for value in called.outputs)
        elif node.op != "call_function" or node.target is operator.getitem or not _makes_tensors(node):
            continue
        elif not (_is_aten(node) or is_attention(node)) or has_order(node):
            return False
        elif not is_view(node):
            attention = attention_flops(node)
            flops += attention or matmul_flops(node)
            held += nbytes(node) if attention else 0
            around += 0 if attention else nbytes(node)
    return loops and around * FLOPS_PER_BYTE <= flops and around <= PART_OF_HELD * held


def _makes_tensors(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, compat.OpOverload) and node.target.namespace == "aten"
