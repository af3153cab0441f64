"""``mstc::window_attention``: softmax attention to some of the keys, without scores or a mask of all pairs.

    window_attention(q, k, v, window, causal, *, scale=None, documents=None, seen=None):
        o[i] = sum_j softmax_j(scale q[i] . k[j]) v[j]    over  i - window < j <= i           if causal
                                                          over  i - window < j < i + window   otherwise

and of these keys, where they are given, those with documents[j] = documents[i], and those with seen[j]. A query that
sees no key gets 0, as from ``scaled_dot_product_attention``. q [B, H, S, D], k and v [B, H or a divisor of it, S, D],
documents [B or 1, S] of any dtype, seen [B or 1, S] boolean; scale D ** -0.5 unless given; a window of `EVERYTHING`
leaves nothing out. It is made of ``window_attention_forward``, which also returns the log-sum-exp [B, H, S], and
``window_attention_backward``:

- on a GPU in half precision by FlashAttention-2, which has windows (but neither documents nor hidden keys);
- on a CPU by PyTorch's fused kernel, a block of queries at a time with the keys that one of them sees;
- elsewhere in plain products, in the same blocks, with scores in float32.

What is held beside operands and results is one block's mask and scores, and sums of the gradients of k and v in
float32 where these are shorter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc import compat

__all__ = ["BACKWARD", "EVERYTHING", "FORWARD", "WINDOW_ATTENTION", "block_rows", "pairs"]

EVERYTHING = 1 << 40  # more tokens than any sequence has
_FEW, _MANY = 128, 256


def block_rows(window: int) -> int:
    """Queries per block. A block of R queries computes the scores of window + R keys; the CPU's kernel is fastest from
    256 rows on."""
    return _MANY if window >= 2 * _MANY else _FEW


def pairs(length: int, window: int, causal: bool) -> int:
    """Pairs of queries and keys that are seen."""
    near = min(length, window)
    lower = near * (near + 1) // 2 + (length - near) * near
    return lower if causal else 2 * lower - length


@torch.library.custom_op("mstc::window_attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    scale: float | None,
    documents: Tensor | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (_dense(x) for x in (q, k, v))
    if documents is None and seen is None and compat.has_flash_window(q, k, v):
        return compat.flash_window(q, k, v, *_sides(window, causal), scale)
    out, lse = _empty(q, v)
    attend = compat.cpu_attention if _on_cpu(q, v) else _products
    for queries, keys, mask in _blocks(q, window, causal, documents, seen):
        part = attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, scale)
        out[:, :, queries], lse[:, :, queries] = part
        del mask  # before the next one is made
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(q, v)


@torch.library.custom_op("mstc::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    window: int,
    causal: bool,
    scale: float | None,
    documents: Tensor | None,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    strides = [torch.empty_like(x, device="meta").stride() for x in (q, k, v)]
    grad, q, k, v = (_dense(x) for x in (grad, q, k, v))
    if documents is None and seen is None and compat.has_flash_window(q, k, v):
        made = compat.flash_window_backward(grad, q, k, v, out, lse, *_sides(window, causal), scale)
        dq, dk, dv = map(_laid_out, made, strides)
        return dq, dk, dv
    dq, dk, dv = (x.new_empty_strided(x.shape, s) for x, s in zip((q, k, v), strides, strict=True))
    sums = [x.new_zeros(x.shape, dtype=lse.dtype) if x.dtype != lse.dtype else x.zero_() for x in (dk, dv)]
    differentiate = compat.cpu_attention_backward if _on_cpu(q, v) else _products_backward
    for queries, keys, mask in _blocks(q, window, causal, documents, seen):
        operands = (q[:, :, queries], k[:, :, keys], v[:, :, keys], out[:, :, queries], lse[:, :, queries])
        part = differentiate(grad[:, :, queries], *operands, mask, scale)
        dq[:, :, queries] = part[0]
        sums[0][:, :, keys] += part[1]
        sums[1][:, :, keys] += part[2]
        del mask
    for result, total in zip((dk, dv), sums, strict=True):
        if result is not total:
            result.copy_(total)
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings, documents, seen = inputs
    ctx.save_for_backward(q, k, v, *output, documents, seen)


def _vjp(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    *operands, documents, seen = ctx.saved_tensors
    return *BACKWARD(grad, *operands, *ctx.settings, documents, seen), *[None] * 5


_forward.register_autograd(_vjp, setup_context=_setup)
torch.library.define(
    "mstc::window_attention",
    "(Tensor q, Tensor k, Tensor v, int window, bool causal, *, float? scale=None, Tensor? documents=None, "
    "Tensor? seen=None) -> Tensor",
)


@torch.library.impl("mstc::window_attention", "CompositeImplicitAutograd")
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    causal: bool,
    *,
    scale: float | None = None,
    documents: Tensor | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    out: Tensor = FORWARD(q, k, v, window, causal, scale, documents, seen)[0]
    return out


WINDOW_ATTENTION = torch.ops.mstc.window_attention.default
FORWARD = torch.ops.mstc.window_attention_forward.default
BACKWARD = torch.ops.mstc.window_attention_backward.default


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def _sides(window: int, causal: bool) -> tuple[int, int]:
    """How far a query sees to the left and to the right."""
    return window - 1, 0 if causal else window - 1


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output with its heads inside of tokens, as the fused kernels leave it, and the log-sum-exp."""
    batch, heads, length, _ = q.shape
    out = q.new_empty((batch, length, heads, v.shape[-1])).transpose(1, 2)
    return out, q.new_empty((batch, heads, length), dtype=torch.promote_types(q.dtype, torch.float32))


# ------------------------------------------------------------------ by blocks of queries


def _blocks(
    q: Tensor, window: int, causal: bool, documents: Tensor | None, seen: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, the keys that one of them sees, 0 where a query sees a key and -inf elsewhere)."""
    length, rows = q.shape[2], block_rows(window)
    left, right = _sides(window, causal)
    band = lru_cache(maxsize=1)(partial(_band, left, right, q))  # one block's mask is that of the next
    for first in range(0, length, rows):
        last = min(first + rows, length)
        low, high = max(first - left, 0), min(last + right, length)
        mask = band(last - first, first - low, high - low)
        if documents is not None or seen is not None:
            visible = _visible(slice(first, last), slice(low, high), documents, seen)
            if visible.device.type == "cpu":
                start, stop = _span(visible)
                low, high = low + start, low + stop
                mask, visible = mask[:, start:stop], visible[..., start:stop]
            mask = mask.masked_fill(~visible, -torch.inf)
        yield slice(first, last), slice(low, high), mask


def _visible(queries: slice, keys: slice, documents: Tensor | None, seen: Tensor | None) -> Tensor:
    """[B or 1, 1, 1 or queries, keys]: where a key is of the query's document and not hidden."""
    if documents is None:
        assert seen is not None
        return seen[:, None, None, keys]
    same = documents[:, None, queries, None] == documents[:, None, None, keys]
    return same if seen is None else same & seen[:, None, None, keys]


def _span(visible: Tensor) -> tuple[int, int]:
    """From the first key that any query sees to behind the last; one key where none is seen."""
    found = visible.flatten(0, 2).any(0).nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 1)


def _band(left: int, right: int, like: Tensor, rows: int, before: int, keys: int) -> Tensor:
    """The mask of a block whose first query is key number ``before`` of those it is given.

    The band is ones, zeros elsewhere; its logarithm is 0 and -inf.
    """
    return like.new_ones((rows, keys)).triu_(before - left).tril_(before + right).log_()


def _on_cpu(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """As `compat.cpu_attention`, on any device."""
    scores = _scores(q, k, scale).add_(_to_heads(mask))
    lse = scores.logsumexp(-1)
    lse.masked_fill_(lse == -torch.inf, 0)  # a query that sees no key
    out = scores.sub_(lse.unsqueeze(-1)).exp_() @ _grouped(v, scores.dtype)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _products_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dS = P * (do v^T - rowsum(do * o)),  dq = scale dS k,  dk = scale dS^T q,  dv = P^T do."""
    heads = k.shape[1]
    wide_q, wide_k, wide_v = (_grouped(x, lse.dtype, heads) for x in (q, k, v))
    wide_grad = _grouped(grad, lse.dtype, heads)
    P = _scores(q, k, scale).add_(_to_heads(mask)).sub_(_grouped(lse, lse.dtype, heads).unsqueeze(-1)).exp_()
    shift = (wide_grad * _grouped(out, lse.dtype, heads)).sum(-1, keepdim=True)
    dS = (wide_grad @ wide_v.mT).sub_(shift).mul_(P).mul_(_scale(q, scale))
    dq = (dS @ wide_k).flatten(1, 2)
    return dq, (dS.mT @ wide_q).sum(2), (P.mT @ wide_grad).sum(2)


def _to_heads(mask: Tensor) -> Tensor:
    """A mask [S, T] or [B, 1, S, T] for scores of heads in groups."""
    return mask if mask.dim() == 2 else mask.unsqueeze(1)


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """[B, heads of k, queries' heads to each, S, T], in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return (_grouped(q, wide, k.shape[1]) * _scale(q, scale)) @ _grouped(k, wide).mT


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale


def _grouped(x: Tensor, dtype: torch.dtype, heads: int | None = None) -> Tensor:
    """[B, H, S, ...] -> [B, heads, H / heads, S, ...]; heads: those of x itself unless given."""
    return x.to(dtype).reshape(x.shape[0], x.shape[1] if heads is None else heads, -1, *x.shape[2:])


# ------------------------------------------------------------------ FLOPs


@register_flop_formula(torch.ops.mstc.window_attention_forward)
def _flops(q: torch.Size, k: Any, v: torch.Size, window: int, causal: bool, *_: Any, **__: Any) -> int:
    """Scores and their product with v, for each pair that is seen."""
    batch, heads, length, width = q
    return 2 * batch * heads * pairs(length, window, causal) * (width + v[-1])


@register_flop_formula(torch.ops.mstc.window_attention_backward)
def _backward_flops(
    grad: Any, q: torch.Size, k: Any, v: torch.Size, out: Any, lse: Any, window: int, causal: bool, *_: Any, **__: Any
) -> int:
    """Scores again, dP, dq, dk, dv, for each pair that is seen."""
    batch, heads, length, width = q
    return 2 * batch * heads * pairs(length, window, causal) * (3 * width + 2 * v[-1])
