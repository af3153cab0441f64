"""Masks: recover causal, sliding-window and per-document structure from explicit attention masks.

Under torch.compile many models build an explicit mask [B, 1, S, S] out of iotas, vectors of position or document
ids and comparisons. It costs S*S memory and keeps attention's fused kernels without a mask away. This pass reads
one element of the mask symbolically (`mstc.graph.predicates`), so the proof costs the same for every S:

    mask(b, h, i, j)  <=>  j <= i            rewritten: no mask, is_causal=True
    mask(b, h, i, j)  <=>  true              rewritten: no mask
    mask(b, h, i, j)  <=>  i - w < j <= i    rewritten: `mstc::window_attention`, as is i - w < j < i + w
    ... and documents[b, i] == documents[b, j], and seen[b, j]    (packed documents, padding)
                                             on a CPU rewritten in the same way, the two vectors being operands

On a GPU fused kernels take masks of documents and padding whole: these stay, and are recorded as a `MaskFact`.
The rewritten call attends to the same pairs, summed by another kernel: equal up to rounding. ``is_causal``
of torch aligns to the first query and key, so it and windows are used only where there are as many queries as keys.

**Buffers.** A mask kept as a module's buffer (``tril`` of ones) is an input of the graph. Its values are read, block
by block, only if the pipeline offers its tensor in ``ctx.facts["inputs"]``: a buffer (no parameter, no argument
of the caller's), real, without gradient. A buffer can be changed between two calls, and no guard of Dynamo's sees
that. So each buffer that a rewrite rests on is written to ``ctx.facts["assumed"]`` as an `Assumed`, and by
offering tensors the pipeline takes it on to check `Assumed.holds` before each call (the same tensor, at the
same version) and to run the graph as it was written where it does not. A buffer that this graph itself changes is
never read. Changes that bypass torch's version counter (``buffer.data``) are not seen, as in autograd.

**Masks from another graph.** An input that another compiled graph made comes with what that graph proved of it
(`mstc.passes.mask_outputs`); the pipeline offers it in ``ctx.facts["marked"]``, and it is assumed in the same way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.attention import SDPA
from mstc.graph.costs import hint
from mstc.graph.editor import Editor
from mstc.graph.predicates.call import Call, Unread, call_of, shape_of, size
from mstc.graph.predicates.constants import Bands, Ramp, describe
from mstc.graph.predicates.facts import MaskFact, Vector
from mstc.graph.predicates.marks import marked
from mstc.graph.predicates.reader import Known, Reader
from mstc.graph.predicates.verdict import Unproven, fact_of
from mstc.graph.reach import ancestors
from mstc.passes.base import Context, Pass, refuse
from mstc.passes.fused import fused_call, window_obstacle
from mstc.report import Fidelity, Refusal

aten = torch.ops.aten

FEWEST_TOKENS = 1024  # from which on a mask of documents or padding is made for a block of queries at a time

Rewrite = Literal["is_causal", "no mask", "window", "vectors"]
_WORDS: dict[Rewrite, str] = {
    "is_causal": "attention with a causal mask becomes is_causal",
    "no mask": "an attention mask that is all true goes",
    "window": "attention with the mask of a window becomes window_attention",
    "vectors": "attention with a mask of documents or padding becomes window_attention",
}


@dataclass(frozen=True)
class MaskSite:
    """An attention call that says the same without its mask; buffers: the inputs whose values the proof rests on."""

    attention: fx.Node
    fact: MaskFact
    rewrite: Rewrite
    buffers: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Assumed:
    """A buffer whose values were read at compile time."""

    tensor: weakref.ref[torch.Tensor]
    version: int

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, about to be passed for the same input, is that buffer, unchanged."""
        return self.tensor() is tensor and tensor._version == self.version


@dataclass(frozen=True)
class AssumedMark:
    """An input that another graph made and marked: any tensor with the same mark will do."""

    values: Ramp | Bands

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor``, about to be passed for the same input, carries that mark."""
        return marked(tensor) == self.values


@dataclass(frozen=True)
class _Proof:
    """What was proven of one mask for one number of queries and keys, and the buffers that were read for it."""

    verdict: MaskFact | Unproven
    buffers: tuple[fx.Node, ...]


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[MaskSite | Refusal]:
    """A site for each attention call whose mask can go, a refusal where one is not proven or needed at run time.

    What is known of a call that stays as it is goes to ``ctx.facts["masks"]`` at once.
    """
    known = known_values(gm, ctx)
    proofs: dict[object, _Proof] = {}
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        try:
            yield from _look_at(node, known, proofs, ctx)
        except Unread as unread:
            yield refuse("masks", node, str(unread))


def _look_at(node: fx.Node, known: Known, proofs: dict[object, _Proof], ctx: Context) -> Iterator[MaskSite | Refusal]:
    """What is known of one call; a mask that several calls share is proven once."""
    call = call_of(node)
    assert call is not None
    mask = call.get("attn_mask")
    queries, keys = (shape_of(call.node_arg(n))[-2] for n in (0, 1))
    if mask is None:
        causal = bool(call.get("is_causal"))
        if not causal or queries == keys:
            ctx.facts.setdefault("masks", {})[node] = MaskFact("causal" if causal else "all_true", causal)
        return
    obstacle = _obstacle(call, mask)
    if obstacle:
        yield refuse("masks", node, obstacle)
        return
    key = (mask, queries, keys)
    if key not in proofs:
        reader = Reader(known)
        verdict = fact_of(mask, queries, keys, reader)
        proofs[key] = _Proof(verdict, buffers_read(reader))
    yield from _outcome(node, proofs[key], ctx, same_length=bool(queries == keys))


def _outcome(node: fx.Node, proof: _Proof, ctx: Context, *, same_length: bool) -> Iterator[MaskSite | Refusal]:
    """What one proof means for one call."""
    fact = proof.verdict
    if isinstance(fact, Unproven):
        yield _refuse_unproven(node, fact)
        return
    rewrite, obstacle = _rewrite_of(node, fact, same_length)
    if not obstacle:
        yield MaskSite(node, fact, rewrite, proof.buffers)
        return
    if fact.kind != "causal":
        ctx.facts.setdefault("masks", {})[node] = fact
    yield from _left(node, fact, obstacle)


def _rewrite_of(node: fx.Node, fact: MaskFact, same_length: bool) -> tuple[Rewrite, str]:
    """What becomes of a call with such a mask, and why it cannot, "" if it can."""
    call = call_of(node)
    assert call is not None
    if fact.kind == "all_true":
        return "no mask", ""
    if fact.kind == "causal":
        return "is_causal", "" if same_length else "there are not provably as many queries as keys"
    if fact.kind == "sliding_window":
        return "window", window_obstacle(call)
    return "vectors", _vectors_obstacle(call, fact)


def _vectors_obstacle(call: Call, fact: MaskFact) -> str:
    """Why ``mstc::window_attention`` cannot stand for attention with a mask of documents or padding, "" if it can."""
    mask: torch.Tensor = call.node_arg(3).meta["val"]
    seen = None if fact.seen is None else fact.seen.vector
    for node_read, vector in ((fact.documents, fact.ids), (fact.padding, seen)):
        if node_read is not None and (vector is None or not _of_batch(vector, mask.shape[0])):
            return "its values are read in another order than that of tokens"
    if mask.device.type != "cpu":
        return "fused kernels of GPUs take it whole"
    if mask.dtype is not torch.bool:
        return "a query that sees no key may average all of them"
    if hint(mask.shape[-1]) < FEWEST_TOKENS:
        return f"fewer than {FEWEST_TOKENS} tokens: it is small"
    return window_obstacle(call)


def _of_batch(vector: Vector, sequences: Any) -> bool:
    """Whether it has a value for each sequence and no more (what lies behind the last token does no harm)."""
    shape = shape_of(vector.node)
    return all(shape[d] == size(sequences) for d, place in enumerate(vector.places) if place == "sequence")


def _left(node: fx.Node, fact: MaskFact, obstacle: str) -> Iterator[Refusal]:
    """Why a mask stays whose structure is known, but for values that may come at run time."""
    if fact.kind == "causal":
        yield refuse("masks", node, f"the mask is causal, but {obstacle}")
    if fact.kind == "sliding_window":
        yield refuse("masks", node, f"the mask of a window ({fact.label}) stays: {obstacle}")
    documents = _input_names([fact.documents]) if fact.documents is not None else ""
    if documents:
        reason = (
            f"the mask separates documents ({fact.label}) that are only known at run time, by {documents}; it stays: "
            f"{obstacle}"
        )
        yield refuse("masks", node, reason, "leave the position or document ids out where each row is one document")
    if fact.padding is not None:
        padding = _input_names([fact.padding]) or "values known at run time"
        reason = f"the mask hides keys ({fact.label}) by {padding}; it stays: {obstacle}"
        yield refuse("masks", node, reason, "leave the attention mask out where no row is padded")


def _refuse_unproven(node: fx.Node, unproven: Unproven) -> Refusal:
    inputs = _input_names(leaf.node for leaf in unproven.leaves)
    reason = f"the mask is not proven: {unproven.reason}"
    if inputs:
        reason += f"; it reads {inputs}"
    return refuse("masks", node, reason, unproven.remedy)


def _obstacle(call: Call, mask: fx.Node) -> str:
    """Why a call's mask is not looked at, "" if it is."""
    if call.get("is_causal"):
        return "the call is given a mask and is_causal"
    if mask.meta.get("needs_grad"):
        return "the mask needs a gradient"
    rank = len(shape_of(call.node_arg(0)))
    shape, wanted = shape_of(mask), shape_of(call.node)
    queries, keys = shape_of(call.node_arg(0))[-2], shape_of(call.node_arg(1))[-2]
    operands = [shape_of(call.node_arg(n)) for n in range(3)]
    if not 2 <= len(shape) <= rank or any(len(s) != rank for s in operands):
        return "the mask or the operands have an unusual number of dimensions"
    if shape[-2] not in (1, queries) or shape[-1] not in (1, keys):
        return "the mask has not the size of the scores"
    for back, extent in enumerate(reversed(shape[:-2]), 3):
        if extent != 1 and (extent != wanted[-back] or extent not in [s[-back] for s in operands]):
            return "the mask has batch dimensions of its own"
    return ""


def _input_names(nodes: Iterable[fx.Node]) -> str:
    """The user's names for the inputs that nodes are computed from, a few of them."""
    inputs = [n for n in ancestors(nodes) if n.op == "placeholder" and isinstance(n.meta.get("val"), torch.Tensor)]
    names = {n.meta.get("user_name", n.name) for n in inputs}
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ------------------------------------------------------------------ values that are known at compile time


def buffers_read(reader: Reader) -> tuple[fx.Node, ...]:
    """The inputs whose values a reader has used."""
    return tuple(sorted((n for n in reader.used if n.op == "placeholder"), key=lambda n: n.name))


def known_values(gm: fx.GraphModule, ctx: Context) -> Known:
    """What constants and offered buffers hold, each described once."""
    offered = ctx.facts.get("inputs", {})
    described: dict[fx.Node, Ramp | Bands | None] = dict(ctx.facts.get("marked", {}))

    def known(node: fx.Node) -> Ramp | Bands | None:
        if node.op not in ("placeholder", "get_attr"):
            return None
        if node not in described:
            tensor = _constant(gm, node) if node.op == "get_attr" else _unchanged(node, offered)
            described[node] = None if tensor is None else describe(tensor)
        return described[node]

    return known


def _constant(gm: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """A constant that the tracing put into the graph (``torch.tensor(0.0)``); a parameter is none."""
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    plain = isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter | compat.FakeTensor)
    return value if plain and value.device.type != "meta" else None


def _unchanged(node: fx.Node, offered: dict[fx.Node, Any]) -> torch.Tensor | None:
    """The tensor offered for a buffer that the graph does not write to."""
    tensor = offered.get(node)
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter | compat.FakeTensor):
        return None
    written = any(user.target is aten.copy_.default and user.args[0] is node for user in node.users)
    return None if written or tensor.requires_grad or tensor.device.type == "meta" else tensor


# ------------------------------------------------------------------ rewriting


def apply(editor: Editor, site: MaskSite, ctx: Context) -> None:
    """Drop the mask of one call, and record what it was."""
    assume(site.buffers, ctx)
    call = _without_mask(editor, editor.resolve(site.attention), site)
    ctx.facts.setdefault("masks", {})[call] = site.fact


def assume(buffers: Iterable[fx.Node], ctx: Context) -> None:
    """Have the pipeline check before each call that these buffers are what they were when they were read."""
    offered, marks = ctx.facts.get("inputs", {}), ctx.facts.get("marked", {})
    for buffer in buffers:
        assumed: Assumed | AssumedMark
        if buffer in marks:
            assumed = AssumedMark(marks[buffer])
        else:
            assumed = Assumed(weakref.ref(offered[buffer]), offered[buffer]._version)
        ctx.facts.setdefault("assumed", {})[buffer] = assumed


def _without_mask(editor: Editor, node: fx.Node, site: MaskSite) -> fx.Node:
    """The same call without its mask, its result laid out in memory as before (views behind it rely on that)."""
    call = call_of(node)
    assert call is not None
    query, key, value, _, dropout, _ = call.args[:6]
    new = fused_call(editor, (query, key, value), site.fact, node, dropout, **_keywords(node))
    editor.replace(node, laid_out_as(editor, new, node), _WORDS[site.rewrite])
    return new


def _keywords(node: fx.Node) -> dict[str, Any]:
    return {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}


def laid_out_as(editor: Editor, new: fx.Node, old: fx.Node) -> fx.Node:
    """``new`` with the order of strides of ``old``, copied only where another kernel chose another order."""
    before, after = _strides(old), _strides(new)
    if all(before[d] == after[d] for d, extent in enumerate(shape_of(old)) if extent != 1):
        return new
    order = sorted(range(len(before)), key=lambda d: _typical(before[d]), reverse=True)
    permuted = editor.call(aten.permute.default, (new, order), like=old)
    copied = editor.call(aten.clone.default, (permuted,), {"memory_format": torch.contiguous_format}, like=old)
    return editor.call(aten.permute.default, (copied, [order.index(d) for d in range(len(order))]), like=old)


def _strides(node: fx.Node) -> tuple[Any, ...]:
    return tuple(size(s) for s in node.meta["val"].stride())


def _typical(stride: Any) -> int:
    """A stride with every size set to the same number: a product of more sizes is a longer stride."""
    return int(stride.subs(dict.fromkeys(stride.free_symbols, 1 << 12)))


MASKS = Pass(name="masks", option="masks", fidelity=Fidelity.ROUNDING, find=find, apply=apply)

__all__ = [
    "MASKS",
    "Assumed",
    "MaskFact",
    "MaskSite",
    "apply",
    "assume",
    "buffers_read",
    "find",
    "known_values",
    "laid_out_as",
]
