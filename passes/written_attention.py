"""Attention that is written out becomes ``scaled_dot_product_attention`` where that says the same.

    softmax(scale * (q k^T) + mask) v  =  scaled_dot_product_attention(q, k, v, is_causal=..., scale=scale)

for a mask that is proven to be causal, with as many queries as keys, or true everywhere (`mstc.graph.predicates`), and
``mstc::window_attention`` for a window. Such rows keep their diagonal, so none is all hidden, where the two would
differ. The mask may be filled in (``masked_fill``, ``where``) or added. A softmax in at least the precision of the
scores is what the fused kernels do. Everything else (softcap, biases, sinks, other masks, dropout) is left to
`query_chunks`, which keeps it as it is written. The fused kernels sum in another order: equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.places import Place
from mstc.graph.predicates.call import Unread, shape_of
from mstc.graph.predicates.facts import Kind, MaskFact
from mstc.graph.predicates.reader import Reader
from mstc.graph.predicates.verdict import fact_of
from mstc.graph.rules.call import Call, operands_of
from mstc.graph.written import Written, find_written
from mstc.graph.written_masks import drops, path_of
from mstc.passes.base import Context, Pass
from mstc.passes.fused import fused_call
from mstc.passes.masks import assume, buffers_read, known_values, laid_out_as
from mstc.report import Fidelity

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_CASTS = (aten._to_copy.default, aten.to.dtype)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)


@dataclass(frozen=True)
class FusedSite:
    """One attention to be fused: its operands (the keys transposed, as the scores read them), and what was proven."""

    written: Written
    query: fx.Node
    keys: fx.Node
    value: fx.Node
    scale: float
    fact: MaskFact
    buffers: tuple[fx.Node, ...]


@dataclass
class _Chain:
    """What stands between the scores and the softmax, read from the softmax on.

    masks: each with whether it is True where a pair is dropped; scaled: a factor was met, so that no mask may follow.
    """

    scale: float = 1.0
    scaled: bool = False
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[FusedSite]:
    known = known_values(gm, ctx)
    for written in find_written(gm.graph):
        site = _site(written, Reader(known))
        if site is not None:
            yield site


def _site(written: Written, reader: Reader) -> FusedSite | None:
    """The site, or None where another form is needed; `query_chunks` then says what becomes of it."""
    if len(written.scores) != 1 or len(written.ends) != 1 or written.readers or written.draws:
        return None
    (scores,), (product,) = written.scores, written.ends
    if any(n.target not in (aten.matmul.default, aten.bmm.default) for n in (scores, product)):
        return None
    softmax = _softmax(product, scores)
    chain = _chain(written, softmax, scores) if softmax is not None else None
    query, keys, value = *_factors(scores), _factors(product)[1]
    if chain is None or not _plain(written, query, keys, value):
        return None
    fact = _fact(chain.masks, scores, reader)
    if fact is None or (fact.window is not None and len(shape_of(scores)) != 4):
        return None
    return FusedSite(written, query, keys, value, chain.scale, fact, buffers_read(reader))


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = operands_of(product)[-2:]
    return left, right


def _plain(written: Written, query: fx.Node, keys: fx.Node, value: fx.Node) -> bool:
    """Batched products [.., Q, D] [.., D, K] and [.., Q, K] [.., K, D], with equal batches, sizes and precision."""
    scores, product = written.scores[0], written.ends[0]
    q, k, v = (shape_of(n) for n in (query, keys, value))
    rank = len(q)
    places = (written.region.proofs[product].place, written.keys.get(scores))
    if places != (Place(rank - 2, q[-2]), Place(rank - 1, k[-1])) or len({len(s) for s in (q, k, v)}) != 1:
        return False
    dtypes = {n.meta["val"].dtype for n in (query, keys, value, product)}
    return rank in (3, 4) and q[:-2] == k[:-2] == v[:-2] and q[-1] == v[-1] and len(dtypes) == 1


def _softmax(product: fx.Node, scores: fx.Node) -> fx.Node | None:
    """The softmax whose result, perhaps cast, is multiplied by the values."""
    node = _factors(product)[0]
    while node.target in (*_CASTS, *_COPIES):
        node = node.all_input_nodes[0]
    return node if node.target in _SOFTMAX and _precise(node, scores) else None


def _precise(node: fx.Node, scores: fx.Node) -> bool:
    """Whether the node computes at least in the precision of the scores."""
    made: torch.dtype = node.meta["val"].dtype
    return made.is_floating_point and torch.finfo(made).eps <= torch.finfo(scores.meta["val"].dtype).eps


def _chain(written: Written, softmax: fx.Node, scores: fx.Node) -> _Chain | None:
    """What is done to the scores before the softmax, or None where it is more than scale and masks."""
    chain = _Chain()
    node: object = softmax.args[0]
    while node is not scores:
        if not isinstance(node, fx.Node) or node not in written.region.proofs or not _precise(node, scores):
            return None
        node = _step(node, chain, written)
    return chain if Call(softmax).dim() == len(shape_of(softmax)) - 1 else None


def _step(node: fx.Node, chain: _Chain, written: Written) -> object:
    """Note what one node does; the node that it does it to, or None."""
    call = Call(node)
    if node.target in (*_CASTS, *_COPIES):
        return node.args[0]
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        factor = node.args[1]
        if not isinstance(factor, int | float) or factor <= 0 or call.arg("rounding_mode") is not None:
            return None
        chain.scale *= factor if node.target is aten.mul.Tensor else 1 / factor
        chain.scaled = True
        return node.args[0]
    if chain.scaled:
        return None
    if node.target is aten.masked_fill.Scalar and drops(node.args[2]):
        chain.masks.append((node.args[1], True))  # type: ignore[arg-type]
        return node.args[0]
    if node.target in (aten.where.self, aten.where.ScalarOther) and drops(node.args[2]):
        chain.masks.append((node.args[0], False))  # type: ignore[arg-type]
        return node.args[1]
    if node.target is aten.add.Tensor and call.arg("alpha") == 1:
        return _added(node, chain, written)
    return None


def _added(node: fx.Node, chain: _Chain, written: Written) -> object:
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    path = path_of(written)
    scores, mask = (left, right) if left in path else (right, left)
    if scores not in path or mask in path or mask.meta.get("needs_grad"):
        return None
    chain.masks.append((mask, False))
    return scores


def _fact(masks: list[tuple[fx.Node, bool]], scores: fx.Node, reader: Reader) -> MaskFact | None:
    """What all masks together say, if that is causal, a window or nothing."""
    shape = shape_of(scores)
    causal, windows = False, []
    for mask, hides in masks:
        if len(shape_of(mask)) < 2 or len(shape_of(mask)) > len(shape):
            return None
        if any(a not in (1, b) for a, b in zip(reversed(shape_of(mask)), reversed(shape), strict=False)):
            return None
        try:
            fact = fact_of(mask, shape[-2], shape[-1], reader, hides=hides)
        except Unread:
            return None
        if not isinstance(fact, MaskFact) or fact.documents is not None or fact.padding is not None:
            return None
        causal |= fact.causal
        windows += [fact.window] if fact.window is not None else []
    if (causal or windows) and shape[-2] != shape[-1]:
        return None
    window = min(windows, default=None)
    kind: Kind = "sliding_window" if windows else "causal" if causal else "all_true"
    return MaskFact(kind, causal, window)


# ------------------------------------------------------------------ rewriting


def apply(editor: Editor, site: FusedSite, ctx: Context) -> None:
    """Put the fused call in the place of the product with the values."""
    assume(site.buffers, ctx)
    product = site.written.ends[0]
    keys = editor.call(aten.transpose.int, (editor.resolve(site.keys), -2, -1), like=product)
    heads = len(shape_of(product)) == 3
    query, key, value = (
        _operand(editor, n, product, heads) for n in (editor.resolve(site.query), keys, editor.resolve(site.value))
    )
    new = fused_call(editor, (query, key, value), site.fact, product, scale=site.scale)
    ctx.facts.setdefault("masks", {})[new] = site.fact
    result = editor.call(aten.squeeze.dim, (new, 1), like=product) if heads else new
    result = laid_out_as(editor, result, product)
    what = f"{'causal ' if site.fact.causal else ''}attention becomes scaled_dot_product_attention"
    if site.fact.window is not None:
        what = "attention to a window becomes window_attention"
    editor.replace(product, result, f"written-out {what}")


def _operand(editor: Editor, node: fx.Node, like: fx.Node, heads: bool) -> fx.Node:
    """With a dimension of heads, and dense in the last dimension, as fused kernels want it."""
    if node.meta["val"].stride(-1) != 1:
        node = editor.call(aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, like=like)
    return editor.call(aten.unsqueeze.default, (node, 1), like=like) if heads else node


WRITTEN_ATTENTION = Pass("written_attention", "written_attention", Fidelity.ROUNDING, find, apply)
