"""Shapes of what the ops return, for their fakes and their forms."""

from __future__ import annotations

from torch import Tensor

from mstc.kernels.common.segments import count_states, state_dtype

__all__ = ["empty_gradients", "empty_outputs", "or_empty"]


def empty_outputs(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(o like v, final states [N, H, K, V], kept states [slot, B, H, K, V]), unfilled."""
    batch, length, heads, key = q.shape
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (heads, key, v.shape[-1])
    dtype = state_dtype(q.dtype)
    final = q.new_empty((batch if documents is None else documents, *state), dtype=dtype)
    kept = q.new_empty((count_states(length, documents), batch, *state), dtype=dtype)
    return v.new_empty(v.shape), final, kept


def empty_gradients(tensors: tuple[Tensor | None, ...], kept: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
    """One gradient for each tensor (an empty one for None), and that of the initial states, unfilled."""
    batch = kept.shape[1] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = (kept.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)
    return *grads, kept.new_empty((batch, *kept.shape[2:]))


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """An op returns tensors only: an empty one where there is no gradient."""
    return like.new_empty(0) if gradient is None else gradient
